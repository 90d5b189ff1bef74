"""The bound of the cache of compiled programs where a variable names its directory."""

from jax._src.lru_cache import LRUCache

from glm4v_jax.devices import cache_bound
from glm4v_jax.devices.cache_bound import EXECUTABLES, MAX_SIZE, with_bound
from glm4v_jax.devices.compilation_cache import cache_files


def test_cache_without_a_bound_has_one_for_executables(monkeypatch, tmp_path):
    """As where a variable names the directory: the least recently used programs are deleted."""
    monkeypatch.delenv(MAX_SIZE, raising=False)
    monkeypatch.setattr(cache_bound, "MAX_BYTES", 25)
    (tmp_path / EXECUTABLES).mkdir()
    (tmp_path / EXECUTABLES / "killed-cache").write_bytes(bytes(10))  # before the time of its use was written
    unbounded = LRUCache(str(tmp_path), max_size=-1)
    cache = with_bound(unbounded)
    for name in "ab":
        cache.put(name, bytes(10))
    assert cache.get("a") and cache is with_bound(unbounded)
    cache.put("c", bytes(10))
    assert sorted(path.name for path in cache_files(tmp_path)) == ["a-atime", "a-cache", "c-atime", "c-cache"]
    bounded = LRUCache(str(tmp_path), max_size=100)
    assert with_bound(bounded) is bounded
    monkeypatch.setenv(MAX_SIZE, "-1")  # wanted
    assert with_bound(unbounded) is unbounded
