"""What Python runs first in the processes that tests start, whose PYTHONPATH has this directory.

JAX's key of a compiled program has a fingerprint of the devices, which on CPUs differs between the processes of one
program. Only the first process keeps programs, so that the others would compile theirs in every run.

A program that the cache lacks is compiled by the first process too, and sent to the others (`environment` in
`helpers_orbax.py`): they wait for it where they did not find it. Another worker of pytest-xdist must not keep it in
between, since the first process would then find it, and send nothing: each worker has keys of its own.
"""

import os
import sys
from importlib.machinery import PathFinder


class KeysOfSeveralProcesses:
    """Finds the module of JAX that makes keys, and has it leave out that fingerprint where there are several."""

    @staticmethod
    def find_spec(name, path=None, _target=None):
        if name != "jax._src.cache_key":
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            fingerprint = module._hash_accelerator_config

            def hash_devices(hashed, devices):
                several = len({device.process_index for device in devices.flat}) > 1
                (module._hash_devices if several else fingerprint)(hashed, devices)
                if several:
                    hashed.update(os.environ.get("PYTEST_XDIST_WORKER", "").encode())

            module._hash_accelerator_config = hash_devices

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, KeysOfSeveralProcesses)
