"""What may be replaced, what never is, and what a write that the system refuses leaves."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lora_drop_runtime.errors import InputError

from lora_drop_export.staging import area, directory, rename
from lora_drop_export.staging.directory import staged_directory
from lora_drop_export.staging.failures import refused_writes
from lora_drop_export.staging.file import check_writable
from tests.support.kill_points import KIND, held, write_directory

NAMES = ["marker.json", "a", "deep/er/old"]


@pytest.fixture(params=["exchange", "journal"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two directories exchanged in one step, or one after the other."""
    if request.param == "journal":
        monkeypatch.setattr(rename, "_renameat2", lambda *_: False)
    return str(request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An old result, alone in its directory."""
    (tmp_path / "in").mkdir()
    write_directory(tmp_path / "in" / "place", "old")
    return tmp_path / "in" / "place"


def stage(place: Path, force: bool = True, meanwhile: Callable[[], object] = lambda: None) -> None:
    with staged_directory(place, force, KIND) as root:
        write_directory(root, "new")
        meanwhile()


def all_below(root: Path) -> dict[str, str | None]:
    """Every entry: a file's text, a link's target, None for a directory."""
    return {
        str(path.relative_to(root)): os.readlink(path)
        if path.is_symlink()
        else path.read_text()
        if path.is_file()
        else None
        for path in sorted(root.rglob("*"))
    }


def refused(place: Path) -> str:
    """What is said of a directory that may not be replaced; no work begins, and nothing changes."""
    before = all_below(place.parent)
    with pytest.raises(InputError) as raised, staged_directory(place, True, KIND):
        pytest.fail("the work began")
    assert all_below(place.parent) == before
    return str(raised.value)


# ── foreign files ──────────────────────────────────────────────────────────────────────────────────────────────


def make_file(root: Path) -> str:
    (root / "deep" / "mine").write_text("mine")
    return "deep/mine"


def make_empty_directory(root: Path) -> str:
    (root / "notes").mkdir()
    return "notes/"


def make_hidden_file(root: Path) -> str:
    (root / ".git").write_text("mine")
    return ".git"


def make_link_in_place_of_a_file(root: Path) -> str:
    (root / "a").rename(root.parent.parent / "moved")
    (root / "a").symlink_to("../../moved")
    return "a"


def make_link_to_a_directory(root: Path) -> str:
    (root.parent.parent / "precious").mkdir()
    (root.parent.parent / "precious" / "file").write_text("mine")
    (root / "link").symlink_to(root.parent.parent / "precious")
    return "link"


def make_odd_name(root: Path) -> str:
    (root / "two\nlines").write_text("mine")
    return "two\\nlines"


FOREIGN = [
    make_file,
    make_empty_directory,
    make_hidden_file,
    make_link_in_place_of_a_file,
    make_link_to_a_directory,
    make_odd_name,
]


@pytest.mark.parametrize("make", FOREIGN)
def test_foreign_entries_are_named_and_stay(place: Path, make, tmp_path: Path) -> None:
    name = make(place)
    before = all_below(tmp_path)
    with pytest.raises(InputError, match="holds more than was written there") as refused:
        stage(place)
    assert f"has 1 entry that is not of this thing: {name}." in str(refused.value)
    assert all_below(tmp_path) == before


@pytest.mark.parametrize("make", FOREIGN)
def test_what_comes_while_the_new_one_is_made_stays(place: Path, make, how: str, tmp_path: Path) -> None:
    made = []
    with pytest.raises(InputError, match="holds more"):
        stage(place, meanwhile=lambda: made.append((make(place), all_below(place))))
    assert all_below(place) == made[0][1]
    assert os.listdir(place.parent) == ["place"]


def test_what_comes_in_the_last_moment_goes_back(place: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last look at the place, before the exchange."""
    genuine, looks = directory.owned_files, []

    def then_one_comes(*arguments: Any) -> frozenset[str]:
        files = genuine(*arguments)
        looks.append(files)
        if len(looks) == 2:
            (place / "late").write_text("mine")
        return files

    monkeypatch.setattr(directory, "owned_files", then_one_comes)
    with pytest.raises(InputError, match="late"):
        stage(place)
    assert (place / "late").read_text() == "mine"
    assert (place / "a").read_text() == "old"
    assert os.listdir(place.parent) == ["place"]


def test_what_comes_into_the_old_one_after_the_exchange_is_kept(
    place: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a process that works in it; where it is now is said, also by the next run."""
    here = os.open(place, os.O_RDONLY)
    genuine = directory.refuse_foreign

    def then_one_comes(*arguments: object) -> None:
        genuine(*arguments)
        os.close(os.open("late", os.O_CREAT | os.O_WRONLY, dir_fd=here))

    monkeypatch.setattr(directory, "refuse_foreign", then_one_comes)
    stage(place)
    monkeypatch.undo()
    os.close(here)
    assert held(place)["a"] == "new"
    (kept,) = [path for path in place.parent.iterdir() if path != place]
    assert [path.name for path in kept.rglob("*") if path.name in ("late", *NAMES)] == ["late"]
    assert f"warning: {kept} has what was at {place}" in capsys.readouterr().err
    stage(place)
    assert str(kept) in capsys.readouterr().err
    assert next(kept.rglob("late")).exists()


def test_a_marker_that_leads_outside_removes_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what lies there looked at, such as the root, which few may change."""
    (tmp_path / "mine").write_text("mine")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: access(path, mode) and Path(path) not in place.parents)
    (place / "marker.json").write_text(json.dumps([*NAMES, "../../mine", str(tmp_path / "mine")]))
    stage(place)
    assert (tmp_path / "mine").read_text() == "mine"
    assert held(place)["a"] == "new"


# ── places ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("folder", [".", "deep/er"])
def test_folders_that_may_not_be_changed(place: Path, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, where the system refused after it, or left the old files beside the new ones for good."""
    access, locked = os.access, place / folder
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked and access(path, mode))  # root has all
    said = refused(place)
    assert "may not be changed" in said
    assert f"{locked} is not readable and writable to you." in said


@pytest.mark.skipif(sys.platform == "win32", reason="has no sticky folders")
def test_of_another_user_in_a_sticky_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in /tmp: before any work, where the system refused after it."""
    file = place.parent / "results.json"
    file.write_text("old", encoding="utf-8")
    place.parent.chmod(0o1777)
    check_writable(file, "--json")  # one's own may be replaced
    monkeypatch.setattr(os, "geteuid", lambda: place.stat().st_uid + 1)
    before = all_below(place.parent)
    said = refused(place)
    assert "another user's" in said
    assert f"In {place.parent}, which is sticky, only its owner may." in said
    with pytest.raises(InputError, match="cannot be written"):
        check_writable(file, "--json")
    assert all_below(place.parent) == before
    check_writable(place.parent / "new.json", "--json")
    place.parent.chmod(0o777)
    check_writable(file, "--json")


@pytest.mark.parametrize("deeper", [".", "deep", "deep/er"])
def test_the_current_directory_is_not_replaced(place: Path, deeper: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place / deeper)
    before = all_below(place)
    for out in (place, Path(os.path.relpath(place))):
        with pytest.raises(InputError, match="runs in") as refused:
            stage(out)
        assert f"cd {place.parent}, and --out place" in str(refused.value)
    assert all_below(place) == before


@pytest.mark.parametrize("deeper", ["new", "deep/er/new"])
def test_nothing_is_written_inside_another(place: Path, deeper: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(place)
    before = all_below(place)
    for out in (place / deeper, tmp_path / "link" / deeper):
        with pytest.raises(InputError, match="would lie inside"):
            stage(out)
    assert all_below(place) == before
    (place / "marker.json").unlink()
    stage(place / deeper)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2775])
def test_permissions_are_the_old_one_s(place: Path, how: str, mode: int) -> None:
    place.chmod(mode)
    stage(place)
    assert held(place)["a"] == "new"
    assert stat.S_IMODE(place.stat().st_mode) == mode


def test_a_link_is_followed_and_stays(place: Path, how: str) -> None:
    (place.parent / "link").symlink_to("place")
    stage(place.parent / "link")
    assert (place.parent / "link").is_symlink()
    assert held(place)["a"] == "new"
    assert sorted(os.listdir(place.parent)) == ["link", "place"]


@pytest.mark.parametrize(("what", "hinted"), [("result", True), ("empty", False), ("notes", False), ("file", False)])
def test_force_is_hinted_at_where_it_replaces(tmp_path: Path, place: Path, what: str, hinted: bool) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    for name in ("notes/a.txt", "file"):
        (tmp_path / name).write_text("mine")
    out = place if what == "result" else tmp_path / what
    with pytest.raises(InputError, match="exists already") as refusal:
        stage(out, force=False)
    assert ("--force" in str(refusal.value)) == hinted
    if hinted:
        stage(out)
        return
    with pytest.raises(InputError, match="--force will not replace it"):
        stage(out)


def test_up_from_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        stage(tmp_path / "no" / ".." / "place")
    assert os.listdir(tmp_path) == []
    (tmp_path / "in").mkdir()
    stage(tmp_path / "in" / ".." / "deep" / "place")
    assert os.listdir(tmp_path / "deep") == ["place"]
    with pytest.raises(InputError, match="exists already"):
        stage(tmp_path / "in" / "..", force=False)


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    with pytest.raises(InputError, match="cannot be used"):
        stage(tmp_path / "one")


@pytest.mark.parametrize("comes", ["directory", "file"])
def test_a_place_that_is_taken_meanwhile_is_not_replaced(tmp_path: Path, how: str, comes: str) -> None:
    """An empty directory too, which a plain rename would replace."""
    place = tmp_path / "place"
    with pytest.raises(InputError, match="exists already"):
        stage(place, False, place.mkdir if comes == "directory" else lambda: place.write_text("mine"))
    assert os.listdir(tmp_path) == ["place"]
    assert list(place.iterdir()) == [] if comes == "directory" else place.read_text() == "mine"


def test_names_as_long_as_the_file_system_allows(tmp_path: Path, how: str) -> None:
    place = tmp_path / ("ä" * 127)
    stage(place)
    stage(place)
    assert os.listdir(tmp_path) == [place.name]


def test_a_user_s_directory_of_a_similar_name_is_no_area(place: Path) -> None:
    similar = place.parent / ".place.abcdefgh.lora-drop"
    similar.mkdir()
    (similar / "diary").write_text("mine")
    stage(place)
    assert (similar / "diary").read_text() == "mine"


# ── several processes ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_living_process_is_left_alone(place: Path) -> None:
    """Another one is refused, with its number; what it makes is not touched."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom lora_drop_export.staging.directory import staged_directory\n"
        "from tests.support.kill_points import KIND, write_directory\n"
        "with staged_directory(Path(sys.argv[1]), True, KIND) as root:\n"
        "    write_directory(root, 'new')\n    print('here', flush=True)\n    input()\n"
    )
    repository = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", script, str(place)]
    with subprocess.Popen(command, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "here\n"
        with pytest.raises(InputError, match="Another command is writing there") as refused:
            stage(place)
        assert f"{place}: process {other.pid}." in str(refused.value)
        assert held(place)["a"] == "old"
        other.communicate("\n", timeout=600)
    assert other.returncode == 0
    assert held(place)["a"] == "new"
    assert os.listdir(place.parent) == ["place"]


def test_without_locks_nothing_of_others_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that has none, the dead cannot be told from the living."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    left = place.parent / ".place.abcdefgh.lora-drop"
    (left / "new").mkdir(parents=True)
    monkeypatch.setattr(area.fcntl, "flock", no_locks)
    stage(place)
    assert held(place)["a"] == "new"
    assert (left / "new").is_dir()
    monkeypatch.undo()
    stage(place)
    assert os.listdir(place.parent) == ["place"]


def test_locks_of_windows(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It locks bytes, which nobody else can read then, and removes no file that is open."""

    def locking(descriptor: int, *_: int) -> None:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) > os.fstat(descriptor).st_size
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    def unlink(path: Path) -> None:
        if str(path) in map(os.path.realpath, Path("/proc/self/fd").iterdir()):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        os.unlink(path)

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(area, "msvcrt", SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    monkeypatch.setattr(Path, "unlink", unlink)
    (place.parent / ".place.abcdefgh.lora-drop" / "new").mkdir(parents=True)  # of a dead one
    with staged_directory(place, True, KIND) as root:
        write_directory(root, "new")
        with pytest.raises(InputError, match=rf"{place}: process {os.getpid()}\."):
            stage(place)
    assert held(place)["a"] == "new"
    assert os.listdir(place.parent) == ["place"]


# ── writes that the system refuses ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "fact"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "The disk is full."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "quota"),
        (OSError(errno.EFBIG, "File too large"), "larger than is allowed"),
        (OSError(errno.EROFS, "Read-only file system"), "read-only"),
        (Exception("No space left on device (os error 28)"), "The disk is full."),
        (RuntimeError('I/O error: Os { code: 27, kind: FileTooLarge, message: "File too large" }'), "larger than"),
        (shutil.Error([("a", "b", str(OSError(errno.ENOSPC, "No space left on device", "b")))]), "The disk is full."),
    ],
)
def test_a_disk_that_takes_no_more(place: Path, error: Exception, fact: str) -> None:
    """Whoever writes: Python, a library in Rust, or shutil.copytree."""

    def fail() -> None:
        raise error

    with pytest.raises(InputError, match=fact):
        stage(place, meanwhile=fail)
    assert held(place)["a"] == "old"
    assert os.listdir(place.parent) == ["place"]


def test_the_number_that_windows_has_for_a_full_disk(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As safetensors and shutil.copytree say it there; on Linux it is that of a host that is down."""
    monkeypatch.setattr(sys, "platform", "win32")
    for said in ("I/O error: Not enough space. (os error 112)", "[('a', 'b', '[WinError 112] …')]"):
        with pytest.raises(InputError, match=r"The disk is full\."), refused_writes(place, "--out"):
            raise RuntimeError(said)


def test_of_a_copy_what_was_written_is_named(tmp_path: Path) -> None:
    """And not the user's file that was read, of which «writing failed» would frighten."""
    error = OSError(errno.ENOSPC, "No space left on device", "/x/read", None, "/x/written")  # as of shutil.copyfile
    with pytest.raises(InputError, match="Writing /x/written failed"), refused_writes(tmp_path, "--out"):
        raise error


def test_an_exchange_that_the_system_refuses(place: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(directory, "exchange", refuse)
    monkeypatch.setattr(directory, "rename_new", refuse)
    for out, before in ((place, "old"), (place.parent / "b" / "c", None)):
        with pytest.raises(InputError, match="cannot take its place"):
            stage(out)
        assert held(out) is None if before is None else held(out)["a"] == before
    assert os.listdir(place.parent) == ["place"]


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), refused_writes(tmp_path, "--out"):
        (tmp_path / "no").read_text()


def test_a_disk_with_no_room_for_the_number_of_the_process(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The area is made, and nothing can be written into it."""
    genuine = Path.mkdir

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(area.os, "write", full)
    monkeypatch.setattr(Path, "mkdir", lambda path, *a, **k: full() if path.name == "new" else genuine(path, *a, **k))
    with pytest.raises(InputError, match="No space left"):
        stage(place)
    monkeypatch.undo()
    assert os.listdir(place.parent) == ["place"]
    assert held(place)["a"] == "old"


def test_what_comes_between_the_two_renames_takes_nothing_away(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another's directory is where the new result was to be: the old one stays where it was put."""
    genuine = rename.rename_new

    def too_late(source: Path, target: Path) -> None:
        if target == place:
            place.mkdir(exist_ok=True)
        genuine(source, target)

    monkeypatch.setattr(rename, "_renameat2", lambda *_: False)
    monkeypatch.setattr(directory, "rename_new", too_late)
    with pytest.raises(InputError, match="exists already"):
        stage(place)
    assert os.listdir(place) == []
    (left,) = (path for path in place.parent.iterdir() if path != place)
    assert held(left / "old")["a"] == "old"
    assert f"warning: {left} has what was at {place}" in capsys.readouterr().err


def test_a_disk_with_no_room_for_the_journal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(area.Area, "write_journal", full)
    with pytest.raises(InputError, match="The disk is full"):
        stage(place)
    assert os.listdir(place.parent) == ["place"]
    assert held(place)["a"] == "old"
