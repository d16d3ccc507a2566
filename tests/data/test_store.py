"""What is found out once is kept by what it was made of, and nothing rests on it being there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trainer.data.store import Store, key_of

KEY = key_of("thing", {"size": 3})


def entries(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def test_a_key_depends_on_kind_and_ingredients_and_not_on_their_order() -> None:
    one = key_of("thing", {"size": 3, "of": ["a", "b"]})

    assert one == key_of("thing", {"of": ["a", "b"], "size": 3})
    others = [("other", 3, ["a", "b"]), ("thing", 4, ["a", "b"]), ("thing", 3, ["b", "a"])]
    keys = {key_of(kind, {"size": size, "of": of}) for kind, size, of in others}
    assert len(keys | {one}) == 4


def test_an_entry_is_there_for_every_store_of_the_folder(tmp_path: Path) -> None:
    Store(tmp_path / "new" / "store").put(KEY, b"content")

    assert Store(tmp_path / "new" / "store").get(KEY) == b"content"
    assert Store(tmp_path / "other").get(KEY) is None


def test_an_entry_may_be_empty_and_the_last_one_put_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)

    store.put(KEY, b"first")
    store.put(KEY, b"")

    assert store.get(KEY) == b""


@pytest.mark.parametrize("damage", [b"", b"short", b"\xff" * 64], ids=["empty", "short", "other"])
def test_a_damaged_entry_is_none(tmp_path: Path, damage: bytes) -> None:
    store = Store(tmp_path)
    store.put(KEY, b"content")
    (entry,) = entries(tmp_path)

    entry.write_bytes(damage)

    assert store.get(KEY) is None


def test_a_put_leaves_nothing_but_the_entry(tmp_path: Path) -> None:
    Store(tmp_path).put(KEY, b"content")

    (entry,) = entries(tmp_path)
    assert list(tmp_path.rglob("*")) == [entry.parent, entry]


def test_a_folder_that_cannot_be_made_keeps_nothing_and_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store = Store(tmp_path / "file" / "store")

    store.put(KEY, b"content")
    store.prune()

    assert store.get(KEY) is None
    assert (tmp_path / "file").read_text() == "in the way"


def test_an_entry_that_can_only_be_read_is_as_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    Store(tmp_path).put(KEY, b"content")
    monkeypatch.setattr(os, "utime", refused)

    assert Store(tmp_path).get(KEY) == b"content"


def test_the_entries_longest_unused_go_first_until_the_rest_fits(tmp_path: Path) -> None:
    # An entry takes 32 bytes more than its content.
    store, keys = Store(tmp_path), [key_of("thing", {"number": number}) for number in range(4)]
    for age, key in enumerate(keys):
        store.put(key, bytes(100))
        os.utime(tmp_path / key[:2] / key[2:], (age, age))
    # Whatever is asked for is new again.
    store.get(keys[0])

    Store(tmp_path, limit=2 * 132).prune()

    assert [store.get(key) is not None for key in keys] == [True, False, False, True]


def test_the_limit_holds_while_entries_are_put(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=2000)

    for number in range(50):
        store.put(key_of("thing", {"number": number}), bytes(100))
        # A sixteenth of the limit is less than two of these.
        assert sum(entry.stat().st_size for entry in entries(tmp_path)) <= 2000 + 2 * 132

    assert len(entries(tmp_path)) >= 2000 // 132


def test_what_a_killed_process_left_goes_an_hour_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    store = Store(tmp_path)
    with monkeypatch.context() as machine:
        machine.setattr(os, "replace", killed)
        # Nor is there time to tidy up.
        machine.setattr(Path, "unlink", killed)
        with pytest.raises(SystemExit):
            store.put(KEY, b"content")
    (left,) = entries(tmp_path)

    store.prune()
    assert left.exists()
    os.utime(left, (0, 0))
    store.prune()

    assert entries(tmp_path) == []


def test_nothing_goes_where_all_fits(tmp_path: Path) -> None:
    store = Store(tmp_path, limit=132)
    store.put(KEY, bytes(100))

    store.prune()
    Store(tmp_path / "nowhere").prune()

    assert store.get(KEY) == bytes(100)
