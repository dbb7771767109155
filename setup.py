"""Packaging: everything is read from settings.ini, the one place for names and versions."""

import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]


class build_with_pages(build_py):
    "Puts the notebooks that commands execute into the package; an editable install finds them beside it."

    def run(self):
        super().run()
        if not self.editable_mode:
            pages = Path(self.build_lib) / package / "nbs"
            pages.mkdir(parents=True, exist_ok=True)
            for name in ("train.ipynb", "explore.ipynb", "lr_find.ipynb", "evaluate.ipynb", "check.ipynb"):
                shutil.copy(Path(settings["nbs_path"]) / name, pages)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    license="Apache-2.0",
    packages=find_packages(include=[package, f"{package}.*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("timm", "export", "dev")},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{package}={package}._modidx:d"],
    },
    cmdclass={"build_py": build_with_pages},
)
