"""libbpf by ctypes: the calls that dispatch needs, as Python functions over descriptors.

Knows nothing of bindings.  Every failure is an OSError that names the call and
its object.  Descriptors are the caller's to close.  linux.py aside, the only
module that imports ctypes.

Source: bpf(2), libbpf's bpf.h and libbpf.h (1.0 and later), include/uapi/linux/bpf.h.
"""

import ctypes
import errno
import os
from ctypes import byref, c_char_p, c_int, c_uint32, c_uint64, c_void_p

from ..errors import SetupError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

ANY, NOEXIST, EXIST = 0, 1, 2  # flags of update
SK_LOOKUP = 36  # enum bpf_attach_type
_PROGRAM_SK_LOOKUP = 30  # enum bpf_prog_type
_LPM_TRIE = 11  # enum bpf_map_type
_NO_PREALLOC = 1  # BPF_F_NO_PREALLOC
_RDONLY = 8  # BPF_F_RDONLY
_BATCH = 8192
_BATCH_OCTETS = 1 << 18

_SYSCALL_PIDFD_GETFD = 438  # the same number on every architecture


def _load_library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise SetupError(
            "dispatch needs libbpf, which is not here: apt-get install libbpf1, "
            "or dnf install libbpf"
        ) from None
    library.libbpf_set_print(None)  # else it writes its own lines among ours
    for name in ("open_file", "find_map_by_name", "find_program_by_name"):
        getattr(library, f"bpf_object__{name}").restype = c_void_p
    library.bpf_map__reuse_fd.argtypes = (c_void_p, c_int)
    library.bpf_map__fd.argtypes = library.bpf_program__fd.argtypes = (c_void_p,)
    library.bpf_object__load.argtypes = library.bpf_object__close.argtypes = (c_void_p,)
    library.bpf_object__find_map_by_name.argtypes = (c_void_p, c_char_p)
    library.bpf_object__find_program_by_name.argtypes = (c_void_p, c_char_p)
    return library


_lib = _load_library()


class _MapInfo(ctypes.Structure):
    """The first members of struct bpf_map_info."""

    _fields_ = [(name, c_uint32) for name in ("type", "id", "key", "value", "entries", "flags")]


class _ProgramInfo(ctypes.Structure):
    """The first members of struct bpf_prog_info."""

    _fields_ = [("type", c_uint32), ("id", c_uint32), ("tag", ctypes.c_ubyte * 8)]


class _LinkInfo(ctypes.Structure):
    """struct bpf_link_info of a link to a network namespace."""

    _fields_ = [
        (name, c_uint32) for name in ("type", "id", "program", "padding", "netns", "attach")
    ]


class _MapCreate(ctypes.Structure):
    """struct bpf_map_create_opts."""

    _fields_ = [
        ("size", ctypes.c_size_t), ("btf_fd", c_uint32), ("btf_key", c_uint32),
        ("btf_value", c_uint32), ("btf_vmlinux", c_uint32), ("inner_map_fd", c_uint32),
        ("flags", c_uint32), ("extra", c_uint64), ("numa_node", c_uint32), ("ifindex", c_uint32),
    ]  # fmt: skip


class _ObjectGet(ctypes.Structure):
    """struct bpf_obj_get_opts."""

    _fields_ = [("size", ctypes.c_size_t), ("flags", c_uint32)]


class _TestRun(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = [
        ("size", ctypes.c_size_t), ("data_in", c_void_p), ("data_out", c_void_p),
        ("data_size_in", c_uint32), ("data_size_out", c_uint32), ("context_in", c_void_p),
        ("context_out", c_void_p), ("context_size_in", c_uint32), ("context_size_out", c_uint32),
        ("result", c_uint32), ("repeat", c_int), ("duration", c_uint32), ("flags", c_uint32),
        ("cpu", c_uint32), ("batch_size", c_uint32),
    ]  # fmt: skip


def _check(result: int, call: str, of: str) -> int:
    """Return what the call returned, or raise what it failed with (libbpf >= 1.0: -errno)."""
    if result >= 0:
        return result
    number = -result if result != -1 else ctypes.get_errno() or errno.EPERM
    # ENOTSUPP is the kernel's own and has no text.
    words = "not supported by this kernel" if number == 524 else os.strerror(number)
    raise OSError(number, f"{call}: {words}", of)


# -- objects and pins ---------------------------------------------------------------


class Loaded:
    """A BPF object file in the kernel.  Owns its maps and program until close()."""

    def __init__(self, path: str, reuse: dict[str, int]) -> None:
        """Load the file, its maps being those of `reuse` where a name is there (borrowed)."""
        self._object = _lib.bpf_object__open_file(path.encode(), None)
        if not self._object:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
        try:
            for name, descriptor in reuse.items():
                _check(_lib.bpf_map__reuse_fd(self._map(name), descriptor), "reuse", name)
            _check(_lib.bpf_object__load(self._object), "load the BPF program", path)
        except BaseException:
            self.close()
            raise

    def _map(self, name: str) -> int:
        find = _lib.bpf_object__find_map_by_name
        found: int | None = find(self._object, name.encode())
        # A variable in a section of its own is a map, too.
        return found or int(find(self._object, f".data.{name}".encode()) or 0)

    def map(self, name: str) -> int:
        """Return the descriptor of a map (borrowed)."""
        return _check(_lib.bpf_map__fd(self._map(name)), "find the map", name)

    def program(self, name: str) -> int:
        """Return the descriptor of a program (borrowed)."""
        found = _lib.bpf_object__find_program_by_name(self._object, name.encode())
        return _check(_lib.bpf_program__fd(found), "find the program", name)

    def close(self) -> None:
        """Give everything back that is not pinned or attached."""
        _lib.bpf_object__close(self._object)


def pin(descriptor: int, path: str) -> None:
    """Keep a map, program or link alive by a name under a bpffs."""
    _check(_lib.bpf_obj_pin(descriptor, path.encode()), "pin", path)


def open_pin(path: str, readonly: bool = False) -> int:
    """Return a descriptor of what is pinned there.  A link cannot be had to be read only."""
    options = _ObjectGet(ctypes.sizeof(_ObjectGet), _RDONLY if readonly else 0)
    return _check(_lib.bpf_obj_get_opts(path.encode(), byref(options)), "open", path)


def _info(descriptor: int, info: ctypes.Structure) -> None:
    size = c_uint32(ctypes.sizeof(info))
    done = _lib.bpf_obj_get_info_by_fd(descriptor, byref(info), byref(size))
    _check(done, "ask about", f"descriptor {descriptor}")


def map_info(descriptor: int) -> tuple[int, int, int, int]:
    """Return a map's id, octets per key, octets per value, and most entries."""
    info = _MapInfo()
    _info(descriptor, info)
    return info.id, info.key, info.value, info.entries


def program_info(descriptor: int) -> tuple[int, str]:
    """Return a program's id and tag (a hash of its instructions)."""
    info = _ProgramInfo()
    _info(descriptor, info)
    return info.id, bytes(info.tag).hex()


def link_info(descriptor: int) -> tuple[int, int]:
    """Return the id of a link's program, and the inode of its network namespace, 0 if gone."""
    info = _LinkInfo()
    _info(descriptor, info)
    return info.program, info.netns


# -- programs -------------------------------------------------------------------------


def attach(program: int, netns: int) -> int:
    """Attach an sk_lookup program to a network namespace; return the link's descriptor."""
    done = _lib.bpf_link_create(program, netns, SK_LOOKUP, None)
    return _check(done, "attach the program", "the network namespace")


def update_link(link: int, program: int) -> None:
    """Replace a link's program, with no packet in between."""
    _check(_lib.bpf_link_update(link, program, None), "replace the program", "the link")


def detach(link: int) -> None:
    """Take a link's program from its network namespace now, whoever else holds the link."""
    _check(_lib.bpf_link_detach(link), "detach", "the link")


def attached(netns: int) -> list[int]:
    """Return the ids of all sk_lookup programs of a network namespace, in their order."""
    ids = (c_uint32 * 64)()
    count = c_uint32(64)
    done = _lib.bpf_prog_query(netns, SK_LOOKUP, 0, None, ids, byref(count))
    _check(done, "ask for the programs of", "the network namespace")
    return list(ids[: count.value])


def run_program(program: int, context: bytes, repeat: int = 1) -> tuple[int, bytes, int]:
    """Run a program on a made-up context: its verdict, the context after, nanoseconds per run."""
    after = ctypes.create_string_buffer(context, len(context))
    options = _TestRun(ctypes.sizeof(_TestRun), repeat=repeat)
    options.context_in = ctypes.cast(ctypes.create_string_buffer(context, len(context)), c_void_p)
    options.context_out = ctypes.cast(after, c_void_p)
    options.context_size_in = options.context_size_out = len(context)
    done = _lib.bpf_prog_test_run_opts(program, byref(options))
    _check(done, "run the program", "on a made-up packet")
    return options.result, after.raw, options.duration


# -- maps -------------------------------------------------------------------------------


def create_trie(name: str, key_octets: int, value_octets: int, entries: int) -> int:
    """Return the descriptor of a new LPM trie, empty; it grows as it is filled."""
    options = _MapCreate(ctypes.sizeof(_MapCreate), flags=_NO_PREALLOC)
    sizes = (key_octets, value_octets, entries)
    return _check(
        _lib.bpf_map_create(_LPM_TRIE, name.encode(), *sizes, byref(options)), "create", name
    )


def lookup(descriptor: int, key: bytes, octets: int) -> bytes | None:
    """Return the value of a key; None where there is none."""
    value = ctypes.create_string_buffer(octets)
    if (done := _lib.bpf_map_lookup_elem(descriptor, key, value)) == -errno.ENOENT:
        return None
    _check(done, "look up", f"key {key.hex()}")
    return value.raw


def update(descriptor: int, key: bytes, value: bytes, of: str, flags: int = ANY) -> None:
    """Set the value of a key: one atomic step."""
    done = _lib.bpf_map_update_elem(descriptor, key, value, c_uint64(flags))
    _check(done, "write", of)


def delete(descriptor: int, key: bytes, of: str) -> bool:
    """Take a key out; False where it was not there."""
    if (done := _lib.bpf_map_delete_elem(descriptor, key)) in (-errno.ENOENT, -errno.EINVAL):
        return False  # a sockmap says EINVAL for an empty slot
    _check(done, "delete", of)
    return True


def update_many(descriptor: int, keys: bytes, values: bytes, count: int, of: str) -> None:
    """Set many keys; not atomic, so only where nobody looks yet.

    libbpf and the kernel run without Python's lock: another thread goes on.
    """
    done = c_uint32(count)
    _check(_lib.bpf_map_update_batch(descriptor, keys, values, byref(done), None), "write many", of)


def read_batches(descriptor: int, key: int, value: int, of: str) -> "Iterator[tuple[bytes, bytes]]":
    """Yield keys and values of a map, many at a time, whose octets per key and value are given."""
    batch = min(_BATCH, _BATCH_OCTETS // value)
    keys = ctypes.create_string_buffer(key * batch)
    values = ctypes.create_string_buffer(value * batch)
    before: ctypes.Array[ctypes.c_char] | None = None
    after = ctypes.create_string_buffer(max(key, 8))
    result = 0
    while result != -errno.ENOENT:  # which comes with the last ones
        count = c_uint32(batch)
        result = _lib.bpf_map_lookup_batch(
            descriptor, before, after, keys, values, byref(count), None
        )
        if result != -errno.ENOENT:
            _check(result, "read", of)
        before = after
        yield keys.raw[: key * count.value], values.raw[: value * count.value]


def read_all(
    descriptor: int, key: int, value: int, of: str, *, nonzero: bool = False
) -> "Iterator[tuple[bytes, bytes]]":
    """Yield every key and value of a map whose octets per key and value are given.

    With `nonzero` only those whose first 64 bits are not 0, which is much faster of a million.
    """
    for keys, values in read_batches(descriptor, key, value, of):
        indexes: Iterable[int] = range(len(keys) // key)
        if nonzero:
            firsts = memoryview(values).cast("Q")[:: value // 8].tolist()
            indexes = (index for index in indexes if firsts[index])
        for index in indexes:
            yield (
                keys[index * key : index * key + key],
                values[index * value : index * value + value],
            )


def has_sk_lookup() -> bool:
    """Whether this kernel can load such programs, as far as it lets us find out."""
    known: int = _lib.libbpf_probe_bpf_prog_type(_PROGRAM_SK_LOOKUP, None)
    return known != 0


def possible_cpus() -> int:
    """Return how many values a per-CPU map has for each key."""
    return _check(_lib.libbpf_num_possible_cpus(), "count", "the possible CPUs")


def close(descriptor: int) -> None:
    """Give a descriptor back."""
    os.close(descriptor)


# -- not BPF, but ctypes ------------------------------------------------------------------


def take_descriptor(pidfd: int, number: int) -> int:
    """Return a copy of another process's descriptor (pidfd_getfd(2), Linux 5.6)."""
    libc: Callable[..., int] = ctypes.CDLL(None, use_errno=True).syscall
    copied = libc(_SYSCALL_PIDFD_GETFD, pidfd, number, 0)
    if copied < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"descriptor {number}")
    return copied


def enter_netns(descriptor: int) -> None:
    """Move this thread to a network namespace (setns(2); os.setns came with Python 3.12)."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "setns")
