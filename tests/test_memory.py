"""The memory objects: who may find, open and believe them, and what a crash leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.processes import SMALL

import shmbroker
from shmbroker import memory, process
from shmbroker.config import Config
from shmbroker.descriptor import Descriptor, read_descriptor, write_descriptor
from shmbroker.memory import Leftover
from shmbroker.naming import BrokerPaths

SHM = Path("/dev/shm")
LAYOUT = {key: value for key, value in SMALL.items() if key != "embed_grace"}
CONFIG = Config.of({**LAYOUT, "ring_bytes": 1 << 20, "segment_bytes": 1 << 20})
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: another user, another namespace")


@pytest.fixture
def paths(tmp_path: Path) -> Iterator[BrokerPaths]:
    """A broker's directory with memory, made without a supervisor; whatever descriptor is there at the end is swept."""
    made = BrokerPaths(tmp_path / "broker")
    made.make()
    held = memory.create(made, CONFIG, store=bytes(16), tail=0, epoch=1)
    kept = descriptor_of(made)
    yield made
    held.close()
    for name in (kept.control, kept.ring):
        (SHM / name[1:]).unlink(missing_ok=True)


def descriptor_of(paths: BrokerPaths) -> Descriptor:
    descriptor = read_descriptor(paths)
    assert descriptor is not None
    return descriptor


def forge(paths: BrokerPaths, **fields: object) -> None:
    """Overwrite fields of the descriptor."""
    paths.descriptor.write_text(json.dumps({**json.loads(paths.descriptor.read_text()), **fields}))


def run_python(code: str, *arguments: object, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*wrapper, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


ATTACH = """
    import os, sys
    from pathlib import Path
    from shmbroker import memory
    from shmbroker.naming import BrokerPaths
    if len(sys.argv) > 2:
        os.setgroups([])
        os.setgid(int(sys.argv[2]))
        os.setuid(int(sys.argv[2]))
    try:
        print("attached" if memory.attach(BrokerPaths(Path(sys.argv[1]))) else "nothing there")
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_objects_and_descriptor_belong_to_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        paths = BrokerPaths(tmp_path / "open-handed")
        paths.make()
        held = memory.create(paths, CONFIG, store=bytes(16), tail=0, epoch=1)
    finally:
        os.umask(before)
    descriptor = held.descriptor
    held.close()
    for path in (SHM / descriptor.control[1:], SHM / descriptor.ring[1:], paths.descriptor):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    for path in (paths.directory, paths.log, paths.queues, paths.index, paths.run):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    memory.remove(paths, descriptor)
    assert not (SHM / descriptor.control[1:]).exists()
    assert not (SHM / descriptor.ring[1:]).exists()
    assert not paths.descriptor.exists()


def test_two_attachments_see_one_memory(paths: BrokerPaths) -> None:
    first, second = memory.attach(paths), memory.attach(paths)
    assert first is not None
    assert second is not None
    first[0].set("kept", 4711)
    assert second[0].get("kept") == 4711


def test_the_next_descriptor_takes_the_place_on_the_disk_that_the_last_one_had(paths: BrokerPaths) -> None:
    """So that a broker starts on a disk without a free block."""
    descriptor = descriptor_of(paths)
    place = paths.descriptor.stat().st_ino
    write_descriptor(paths, descriptor)
    assert paths.descriptor.stat().st_ino == place, "what says the same is not written again"
    memory.remove(paths, descriptor)
    assert not paths.descriptor.exists()
    short = dataclasses.replace(descriptor, store="00")
    write_descriptor(paths, short)
    assert paths.descriptor.stat().st_ino == place
    assert read_descriptor(paths) == short
    write_descriptor(paths, descriptor)


@pytest.mark.parametrize("planted", ["a link", "a second name", "a pipe"])
def test_a_descriptor_is_never_written_through_what_somebody_else_may_hold(paths: BrokerPaths, planted: str) -> None:
    descriptor = descriptor_of(paths)
    memory.remove(paths, descriptor)
    temporary, theirs = paths.descriptor.with_suffix(".tmp"), paths.directory / "theirs"
    temporary.unlink()
    theirs.write_text("not ours")
    if planted == "a link":
        temporary.symlink_to(theirs)
    elif planted == "a second name":
        temporary.hardlink_to(theirs)
    else:
        os.mkfifo(temporary)
    write_descriptor(paths, descriptor)
    assert theirs.read_text() == "not ours"
    assert read_descriptor(paths) == descriptor
    assert paths.descriptor.stat().st_nlink == 1


def test_memory_of_another_layout_is_refused_and_its_unflushed_bytes_can_be_read(paths: BrokerPaths) -> None:
    attached = memory.attach(paths)
    assert attached is not None
    region, descriptor = attached
    region.set("state", memory.STATE_RUNNING)
    region.raise_to("system_capacity", 1 << 20)
    position, end = region.append_system(3, [b"not on the disk"])
    written = region.read_raw(position)
    with (SHM / descriptor.control[1:]).open("r+b") as control:
        control.seek(16)  # fingerprint
        control.write(b"\xff" * 8)
    with pytest.raises(shmbroker.LayoutMismatch, match="fingerprint ffffffffffffffff"):
        memory.attach(paths)
    assert memory.leftover(paths)[0] is Leftover.FOREIGN
    assert b"".join(data for _, data in memory.unflushed(paths, descriptor, chunk_bytes=16)) == written
    assert end == position + len(written or b"")


@pytest.mark.parametrize("offset", range(0, 240, 8))
def test_no_byte_of_the_header_is_believed_unchecked(paths: BrokerPaths, offset: int) -> None:
    """Every field overwritten: attach refuses, or finds nothing, or had no use for the field; it never crashes."""
    with (SHM / descriptor_of(paths).control[1:]).open("r+b") as control:
        control.seek(offset)
        control.write(b"\xa5" * 8)
    done = run_python(ATTACH, paths.directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("LayoutMismatch", "nothing", "attached")


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_an_object_cut_short_is_refused_instead_of_crashing(paths: BrokerPaths, size: int) -> None:
    os.truncate(SHM / descriptor_of(paths).control[1:], size)
    done = run_python(ATTACH, paths.directory)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("LayoutMismatch", "nothing")


@pytest.mark.parametrize(
    "fields",
    [
        {"control": "/etc/passwd"},
        {"ring": "/shmbroker-../../etc/passwd-r"},
        {"format": 2},
        {"surprise": 1},
        {"control": 7},
    ],
)
def test_a_descriptor_that_we_did_not_write_is_refused(paths: BrokerPaths, fields: dict[str, object]) -> None:
    forge(paths, **fields)
    with pytest.raises(shmbroker.LayoutMismatch, match=r"broker\.json is no descriptor"):
        memory.attach(paths)


def test_a_descriptor_behind_a_link_is_not_followed(paths: BrokerPaths) -> None:
    moved = paths.directory / "elsewhere.json"
    paths.descriptor.rename(moved)
    paths.descriptor.symlink_to(moved)
    with pytest.raises(OSError, match="symbolic links"):
        memory.attach(paths)


def test_memory_of_another_boot_is_as_good_as_none(paths: BrokerPaths) -> None:
    forge(paths, boot_id="0" * 32)
    assert memory.attach(paths) is None
    assert memory.leftover(paths) == (Leftover.NOTHING, None)


def test_the_descriptor_in_a_copied_directory_leads_nowhere(paths: BrokerPaths) -> None:
    copy = BrokerPaths(paths.directory.with_name("copy"))
    shutil.copytree(paths.directory, copy.directory)
    assert read_descriptor(copy) is None
    assert memory.attach(copy) is None
    assert memory.leftover(copy) == (Leftover.NOTHING, None), "the original's memory is not the copy's to remove"


def test_memory_that_names_another_broker_is_refused(paths: BrokerPaths, tmp_path: Path) -> None:
    other = BrokerPaths(tmp_path / "other")
    other.make()
    held = memory.create(other, CONFIG, store=bytes(16), tail=0, epoch=1)
    theirs = held.descriptor
    held.close()
    forge(paths, control=theirs.control, ring=theirs.ring)
    with pytest.raises(shmbroker.LayoutMismatch, match="belongs to another broker"):
        memory.attach(paths)
    memory.remove(other, theirs)


def test_a_too_small_dev_shm_is_told_with_need_and_remedy(tmp_path: Path) -> None:
    paths = BrokerPaths(tmp_path / "large")
    paths.make()
    huge = Config.of({"ring_bytes": 2 << 30, "claim_tables": 65_535, "claim_window": 65_536})
    with pytest.raises(shmbroker.NotEnoughMemory, match=r"needs \d+\.\d MiB .* lower ring_bytes.*--shm-size=\d+m"):
        memory.create(paths, huge, store=bytes(16), tail=0, epoch=1)
    assert not paths.descriptor.exists()


@as_root
def test_a_dev_shm_of_docker_size_that_is_nearly_full_gives_an_error_and_no_sigbus(tmp_path: Path) -> None:
    code = """
        import shmbroker, subprocess, sys
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + sys.argv[2], "none", "/dev/shm"], check=True)
        try:
            shmbroker.open(sys.argv[1]).close()
            print("opened")
        except shmbroker.NotEnoughMemory as error:
            print(error)
    """
    wrapper = ("unshare", "--mount")
    refused = run_python(code, tmp_path / "refused", "24m", wrapper=wrapper)
    needed = re.search(r"needs (4\d\.\d) MiB", refused.stdout)
    assert needed, refused
    assert "24.0 MiB are free" in refused.stdout
    assert f"--shm-size={math.ceil(float(needed[1]))}m" in refused.stdout
    assert run_python(code, tmp_path / "docker", "64m", wrapper=wrapper).stdout == "opened\n"


@as_root
def test_another_user_may_not_attach(paths: BrokerPaths) -> None:
    for path in (paths.directory.parent.parent, paths.directory.parent, paths.directory, paths.run):
        path.chmod(0o755)
    paths.descriptor.chmod(0o644)
    done = run_python(ATTACH, paths.directory, 65534)
    assert done.stdout.startswith("AttachRefused"), done


@as_root
@pytest.mark.parametrize("mode", [0o666, 0o660])
def test_an_object_open_to_others_or_made_by_others_is_refused(paths: BrokerPaths, mode: int) -> None:
    control = SHM / descriptor_of(paths).control[1:]
    control.chmod(mode)
    with pytest.raises(shmbroker.AttachRefused, match=f"mode {mode:o}"):
        memory.attach(paths)
    control.chmod(0o600)
    os.chown(control, 65534, 65534)
    with pytest.raises(shmbroker.AttachRefused, match="has owner 65534"):
        memory.attach(paths)


@as_root
def test_the_broker_of_a_directory_is_started_by_its_owner_only(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with pytest.raises(shmbroker.AttachRefused, match="belongs to user 65534"):
        shmbroker.open(theirs)


@as_root
@pytest.mark.parametrize("kind", ["--pid", "--ipc"])
def test_another_pid_or_ipc_namespace_is_refused_with_the_remedy(paths: BrokerPaths, kind: str) -> None:
    wrapper = ("unshare", kind, "--fork", "--mount-proc") if kind == "--pid" else ("unshare", kind)
    done = run_python(ATTACH, paths.directory, wrapper=wrapper)
    assert done.stdout.startswith("AttachRefused"), done
    assert "--pid=container:NAME and --ipc=container:NAME" in done.stdout


def test_a_process_is_known_by_pid_and_start_and_a_dead_one_is_no_process() -> None:
    me = process.own_identity()
    assert process.is_alive(me)
    assert not process.is_alive(me._replace(start_ticks=me.start_ticks + 1)), "the pid of a former process"
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        from shmbroker._native import _core

        identity = process.Identity(child.pid, _core.start_ticks(child.pid))
        pidfd = process.open_pidfd(*identity)
        assert pidfd is not None
        assert not process.has_ended(pidfd)
        child.kill()
        assert process.wait_ended(pidfd, 10.0)
        assert not process.is_alive(identity), "a zombie is dead"
        os.close(pidfd)


def test_a_file_lock_has_one_holder_and_goes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = """
        import sys
        from pathlib import Path
        from shmbroker import process
        lock = process.FileLock(Path(sys.argv[1]))
        print(lock.acquire(), flush=True)
        input()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"True\n"
        assert process.lock_holder(path) == holder.pid
        mine = process.FileLock(path)
        assert not mine.acquire(0.1)
        holder.kill()
        assert mine.acquire(10.0), "the kernel releases the lock of a killed holder"
        mine.close()
    assert process.lock_holder(path) == 0
