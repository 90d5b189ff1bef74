"""Free memory as the kernel and devices report it, and the check that what is to be loaded fits."""

import types

import pytest

from glm4v_jax.devices.memory import Memory, cgroup_memory, check_memory, device_free, host_memory, memory_of
from glm4v_jax.errors import MemoryShortageError

MEMINFO = "MemTotal:       24684100 kB\nMemFree:        14271088 kB\nMemAvailable:   21602584 kB\nHugePages_Total: 0\n"
LIMIT = "the memory limit of this process's control group"


def reader(files):
    """Reads from a dictionary as `read_file` does from the disk."""

    def read(path):
        if path not in files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return files[path]

    return read


def test_the_host_has_what_is_available_and_not_only_what_is_unused():
    assert host_memory(reader({"/proc/meminfo": MEMINFO})) == Memory("host memory", 21602584 << 10, 24684100 << 10)
    assert host_memory(reader({})) is None


def test_a_limit_of_version_2_counts_pages_of_files_as_free():
    files = {
        "/proc/self/cgroup": "0::/user.slice/job\n",
        "/sys/fs/cgroup/user.slice/job/memory.max": "8000\n",
        "/sys/fs/cgroup/user.slice/job/memory.current": "5000\n",
        "/sys/fs/cgroup/user.slice/job/memory.stat": "anon 3000\ninactive_file 1500\nactive_file 500\n",
    }
    assert cgroup_memory(reader(files)) == Memory(LIMIT, 5000, 8000)


def test_the_tightest_of_nested_limits_counts():
    files = {
        "/proc/self/cgroup": "0::/a/b\n",
        "/sys/fs/cgroup/a/b/memory.max": "max\n",
        "/sys/fs/cgroup/a/b/memory.current": "10\n",
        "/sys/fs/cgroup/a/memory.max": "100\n",
        "/sys/fs/cgroup/a/memory.current": "90\n",
        "/sys/fs/cgroup/memory.max": "1000\n",
        "/sys/fs/cgroup/memory.current": "90\n",
    }
    assert cgroup_memory(reader(files)) == Memory(LIMIT, 10, 100)


def test_a_limit_of_version_1_is_read_from_the_containers_root_where_its_path_is_the_hosts():
    files = {
        "/proc/self/cgroup": "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "4096\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1024\n",
        "/sys/fs/cgroup/memory/memory.stat": "total_inactive_file 24\ntotal_active_file 0\n",
    }
    assert cgroup_memory(reader(files)) == Memory(LIMIT, 3096, 4096)


@pytest.mark.parametrize("limit", ["9223372036854771712", "max"])
def test_no_limit_is_none(limit):
    files = {
        "/proc/self/cgroup": "4:memory:/\n0::/\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": limit,
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "1024",
        "/sys/fs/cgroup/memory.max": "max",
        "/sys/fs/cgroup/memory.current": "1024",
    }
    assert cgroup_memory(reader(files)) is None


def device(platform="gpu", kind="NVIDIA H200", **stats):
    return types.SimpleNamespace(platform=platform, device_kind=kind, memory_stats=lambda: stats or None)


def test_a_device_has_what_it_reports_or_what_its_chip_has():
    found = device_free(device(bytes_limit=100, bytes_in_use=30))
    assert (found.free, found.total) == (70, 100) and "H200" in found.place
    assert device_free(device(platform="tpu", kind="TPU v5e")).free == 16 << 30
    assert device_free(device(kind="unheard of")) is None


def test_of_several_devices_the_fullest_counts_and_all_of_a_cpu_share_the_host():
    two = [device(bytes_limit=100, bytes_in_use=used) for used in (10, 40)]
    assert [memory.free for memory in memory_of(two)] == [60]
    read = reader({"/proc/meminfo": MEMINFO})
    assert [memory.place for memory in memory_of([device("cpu")] * 2, read)] == ["host memory"]
    assert memory_of([]) == []


def test_what_does_not_fit_is_refused_with_both_numbers_and_what_would(monkeypatch):
    memories = [Memory("host memory", 50_000_000_000), Memory(LIMIT, 22_100_000_000)]
    check_memory(22_100_000_000, "weights", memories)
    with pytest.raises(MemoryShortageError) as caught:
        check_memory(42_000_000_000, "weights in float32", memories, lambda memory: f"fits: {memory.free}")
    assert str(caught.value) == (
        f"needs 42.0 GB for weights in float32, found 22.1 GB free of {LIMIT}; fits: 22100000000; GLM4V_MEMORY_CHECK=0 "
        "loads all the same"
    )
    monkeypatch.setenv("GLM4V_MEMORY_CHECK", "0")
    check_memory(42_000_000_000, "weights in float32", memories)
