"""Where programs run: meshes of devices, several processes, chips, and the cache of compiled programs.

mesh.py               mesh axes, and the one table from logical names to them
distributed.py        several processes as one program: joining, agreeing, gathering
failure.py            a failure of one process ends all of them
coordination.py       the key-value store of JAX's coordination service
launchers.py          whether Slurm, Open MPI, Kubernetes or Cloud TPU has started several processes
hardware.py           one table of chips: memory, FLOP/s, bandwidth
memory.py             free memory of host, control group and devices; whether what is to be loaded fits
compilation_cache.py  compiled programs kept on disk
program_limit.py      compiled programs in memory: fewer than Linux lets a process have
"""
