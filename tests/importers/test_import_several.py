"""Files with several commands: one is read, and each of the others is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import import_file

from trainer.errors import InputError
from trainer.importers import Imported, imported
from trainer.importers.documents import read_document

FIRST = "accelerate launch a/train_dreambooth_lora.py --instance_data_dir p --rank 3"
SECOND = (
    "accelerate launch \\\n  b/train_dreambooth_lora_sdxl.py \\\n  --instance_data_dir q --rank 7"
)
KOHYA = "accelerate launch sdxl_train_network.py --network_module networks.lora --network_dim 5"
FAILS = "python make_masks.py 'photos --all\n"


def told(found: Imported, part: str) -> list[str]:
    """The remarks that hold these words."""
    return [remark for remark in found.remarks if part in remark]


def test_the_second_command_of_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    found = import_file(tmp_path, "both.sh", f"set -e\n{FIRST}\n\n{SECOND}\n")

    assert found.values["rank"] == 3
    [remark] = told(found, "not read")
    assert "`train_dreambooth_lora_sdxl.py` in line 4" in remark
    assert "a file of its own" in remark
    assert remark in found.text.replace("\n# ", "\n")


@pytest.mark.parametrize("between", [" && ", "; ", ";", " | tee log; ", " & ", " > log 2>&1; "])
def test_a_second_command_of_the_same_line_is_named(between: str, tmp_path: Path) -> None:
    found = import_file(tmp_path, "both.sh", f"{FIRST}{between}{FIRST} --seed 5\n")

    assert found.values["rank"] == 3
    assert "seed" not in found.values
    assert "`train_dreambooth_lora.py` in line 1" in told(found, "not read")[0]


def test_lines_are_counted_in_files_of_windows_too(tmp_path: Path) -> None:
    text = FIRST.replace(" --", " ^\r\n  --") + "\r\n" + FIRST + "\r\n"
    found = import_file(tmp_path, "both.bat", text)

    assert found.values["rank"] == 3
    assert "in line 4" in told(found, "not read")[0]


def test_a_training_is_read_although_something_else_runs_first(tmp_path: Path) -> None:
    found = import_file(tmp_path, "all.sh", f"python tag_pictures.py --folder p\n{KOHYA}\n")

    assert found.program == "kohya"
    assert found.values["rank"] == 5
    assert "`tag_pictures.py` in line 1" in told(found, "not read")[0]


def test_a_command_without_options_or_in_a_comment_is_none(tmp_path: Path) -> None:
    text = f"python download.py\n{FIRST}  # then train.py --more\n# {SECOND}\nsleep 5\n"

    assert told(import_file(tmp_path, "one.sh", text), "not read") == []


def test_a_line_that_cannot_be_parted_is_named_where_it_comes_later(tmp_path: Path) -> None:
    found = import_file(tmp_path, "all.sh", f"{FIRST}\n{FAILS}")

    assert "not read: line 2." in told(found, "not read")[0]
    with pytest.raises(InputError, match="line 1: a quotation does not end"):
        import_file(tmp_path, "wrong.sh", f"{FAILS}{FIRST}\n")


def test_variables_of_the_same_line_are_known(tmp_path: Path) -> None:
    found = import_file(tmp_path, "one.sh", f"R=6; {FIRST.replace('3', '$R')} 2> errors.txt\n")

    assert found.values["rank"] == 6
    assert told(found, "not read") == []


def test_separators_inside_values_part_nothing() -> None:
    line = "python train_network.py --network_module networks.lora --keep_tokens_separator='|||' "
    found = imported([read_document(line + "--caption_prefix='a; b && c' --network_dim 5")])

    assert found.values["rank"] == 5
    assert {e.name: e.value for e in found.left}["caption_prefix"] == "a; b && c"


def test_a_known_script_with_nothing_but_a_variable_is_refused_by_that(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stands for no option by name"):
        import_file(tmp_path, "one.sh", 'python train_db.py "${ARGS[@]}"\n')


def test_two_command_lines_are_no_one_training() -> None:
    documents = [read_document(KOHYA), read_document(KOHYA)]

    with pytest.raises(InputError, match="several command lines"):
        imported(documents)


def test_files_of_two_programs_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "k.toml").write_text('network_module = "networks.lora"\n')
    documents = [read_document(str(tmp_path / "k.toml")), read_document(FIRST)]

    with pytest.raises(InputError, match="several programs: .*sd-scripts; .*diffusers"):
        imported(documents)
