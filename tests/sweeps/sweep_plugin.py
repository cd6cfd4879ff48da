"""Methods that fail in their own ways, registered by being imported: what a user's ``--import`` file looks like.

Each is ``fedspine_uniform`` but for what happens when it first asks for the schedule of round 2. Where the environment
names a file in ``SWEEP_MENDED`` and it exists, nothing happens.
"""

import errno
import os
import signal
import time
from pathlib import Path

import fedsim
from fedsim.methods.base import cubic_schedule

FAULT_ROUND = 2


def crash():
    raise ZeroDivisionError("an error that nobody foresaw")


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk():
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.replace = refuse  # this process ends with the cell


def leave():
    os._exit(7)


def dawdle():
    time.sleep(60)


def schedule_with(fault):
    def schedule(round_index, config):
        mended = os.environ.get("SWEEP_MENDED")
        if round_index == FAULT_ROUND and not (mended and Path(mended).exists()):
            fault()
        return cubic_schedule(round_index, config)

    return schedule


for fault in (crash, be_killed, fill_the_disk, leave, dawdle):
    name = f"made_to_{fault.__name__}"
    method = fedsim.Method(name, "fails", (), prunes=True, defaults={}, schedule=schedule_with(fault))
    fedsim.register_method(name, method)
