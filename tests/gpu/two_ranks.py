"""One of two ranks that share one GPU, as two nodes of one device each: NCCL and Lightning refuse two ranks on one device, gloo does not.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 ... python tests/gpu/two_ranks.py RUN_DIR
"""

import functools
import sys

import lightning as L

from resnet_nb.run import worker

worker.join_ranks = lambda config: None  # over NCCL; here Lightning brings them together
worker.L.Trainer = functools.partial(L.Trainer, num_nodes=2)
for name in ("DDPStrategy", "ExactDDPStrategy"):
    strategy = getattr(worker, name)

    def over_gloo(strategy=strategy, **options):
        return strategy(**options | {"process_group_backend": "gloo"})

    setattr(worker, name, over_gloo)


def one_device(config, run_dir, attempt, first_step, make=worker.make_trainer):
    "The run says two devices; each rank has one of them."
    trainer_of = worker.L.Trainer
    worker.L.Trainer = lambda **options: trainer_of(**options | {"devices": 1})
    try:
        return make(config, run_dir, attempt, first_step)
    finally:
        worker.L.Trainer = trainer_of


worker.make_trainer = one_device
sys.exit(worker.main(sys.argv[1]))
