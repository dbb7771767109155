"""Packaging: everything is read from settings.ini, the one place for names and versions."""

from configparser import ConfigParser

from setuptools import setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    author=settings["author"],
    license="Apache-2.0",
    packages=[settings["lib_path"]],
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
    entry_points={
        "console_scripts": settings["console_scripts"].split(),
        "nbdev": [f"{settings['lib_path']}={settings['lib_path']}._modidx:d"],
    },
)
