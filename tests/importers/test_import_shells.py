"""Commands as a shell, cmd and PowerShell read them: comments, quotation marks and variables."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import import_file

from trainer.errors import InputError
from trainer.importers import Imported

SCRIPT = "train_dreambooth_lora.py"
LINE = f"accelerate launch {SCRIPT} --instance_data_dir p"
OTHER = f"accelerate launch {SCRIPT} --rank 1"


def values(folder: Path, name: str, text: str) -> dict[str, object]:
    found: Imported = import_file(folder, name, text)
    assert not any("not read" in remark for remark in found.remarks)
    return dict(found.values)


@pytest.mark.parametrize("mark", ["rem ", "  @REM ", ":: ", "echo ", "@echo "])
def test_comments_of_cmd_are_no_commands(mark: str, tmp_path: Path) -> None:
    text = f"@echo off\r\n{mark}{OTHER} it's \"\r\n{LINE} --rank 7\r\n"

    assert values(tmp_path, "run.bat", text)["rank"] == 7


@pytest.mark.parametrize("mark", ["<<EOF", "<<-'EOF'", "<< EOF"])
def test_a_text_for_another_program_is_no_command(mark: str, tmp_path: Path) -> None:
    text = f"cat {mark} > other.sh\n{OTHER}\nEOF\necho {OTHER}\n{LINE} --rank 7\n"

    assert values(tmp_path, "run.sh", text)["rank"] == 7


def test_a_sign_inside_a_word_begins_no_comment(tmp_path: Path) -> None:
    shell = values(tmp_path, "a.sh", f"{LINE}#2 --rank 8 # --seed 3\n")
    windows = values(tmp_path, "a.bat", f"{LINE}#2 --output_dir #x --rank 8\n")

    assert (shell["images_data_url"], shell["rank"]) == ("p#2", 8)
    assert "seed" not in shell
    assert (windows["images_data_url"], windows["rank"]) == ("p#2", 8)


@pytest.mark.parametrize(
    ("name", "joint"), [("a.sh", "\\"), ("a.bat", "^"), ("a.cmd", "^"), ("a.ps1", "`")]
)
def test_each_shell_joins_lines_by_its_own_sign(name: str, joint: str, tmp_path: Path) -> None:
    found = values(tmp_path, name, f"{LINE} {joint}\r\n  --rank 8 {joint}\r\n  --seed 3\r\n")

    assert (found["rank"], found["seed"]) == (8, 3)


@pytest.mark.parametrize("name", ["a.bat", "a.ps1"])
def test_a_folder_of_windows_joins_no_lines(name: str, tmp_path: Path) -> None:
    text = (
        f"accelerate launch {SCRIPT} --rank 8 --instance_data_dir C:\\pics\\\r\necho --seed 3\r\n"
    )
    found = values(tmp_path, name, text)

    assert found["images_data_url"] == "C:/pics/"
    assert "seed" not in found


def test_variables_of_cmd_are_filled(tmp_path: Path) -> None:
    text = f'set MODEL=some/base\r\n@set "R=6"\r\n{LINE} --rank %R%'
    text += " --pretrained_model_name_or_path=%model% --instance_prompt 100%\r\n"
    found = values(tmp_path, "a.bat", text)

    assert (found["rank"], found["model_url"]) == (6, "some/base")
    assert found["instance_prompt"] == "100%"


@pytest.mark.parametrize("place", ["%PICS%", "%~dp0pics", "%1"])
def test_variables_of_cmd_that_are_set_elsewhere_are_told(place: str, tmp_path: Path) -> None:
    text = f"accelerate launch {SCRIPT} --instance_data_dir={place} --rank 8\r\n"
    found = import_file(tmp_path, "a.bat", text)

    assert "Set elsewhere, to be filled in: instance_data_dir." in found.remarks


def test_powershell_writes_quotation_marks_twice_or_after_a_backtick(tmp_path: Path) -> None:
    text = f'{LINE} --instance_prompt \'it\'\'s\' --class_prompt "a `"b""" --rank 8\n'
    found = values(tmp_path, "a.ps1", text)

    assert (found["instance_prompt"], found["class_prompt"], found["rank"]) == ("it's", 'a "b"', 8)


def test_single_quotes_keep_variables_as_they_are_written(tmp_path: Path) -> None:
    text = f"R=6\n{LINE} --instance_prompt 'a $R cup' --output_dir \"o$R\" --rank $R\n"
    found = values(tmp_path, "a.sh", text)

    assert (found["instance_prompt"], found["output_name"]) == ("a $R cup", "o6")
    assert found["rank"] == 6


@pytest.mark.parametrize(
    "after",
    ["|tee log", "&", "||exit", ")", " < /dev/null", " 2>&1|tee log", " >log 2>&1", " &> log", ";"],
)
def test_what_stands_after_a_command_belongs_to_no_option(after: str, tmp_path: Path) -> None:
    begin = "(" if after == ")" else ""
    found = values(tmp_path, "a.sh", f"{begin}{LINE} --rank 8 --output_dir out{after}\n")

    assert (found["rank"], found["output_name"]) == (8, "out")


def test_options_after_a_redirection_are_read(tmp_path: Path) -> None:
    assert values(tmp_path, "a.sh", f"{LINE} > log --rank 8\n")["rank"] == 8


def test_a_quotation_may_go_over_lines_and_a_joint_may_be_the_last(tmp_path: Path) -> None:
    found = values(tmp_path, "a.sh", f"{LINE} --instance_prompt 'a\nb' --rank 8 \\")

    assert (found["instance_prompt"], found["rank"]) == ("a\nb", 8)


@pytest.mark.parametrize("words", ["dog \u2014rank 8", "dog -r 8", "\u201ca dog\u201d"])
def test_what_no_shell_reads_as_an_option_is_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="by name|word processor"):
        import_file(tmp_path, "a.sh", f"{LINE} --instance_prompt {words}\n")


@pytest.mark.parametrize(
    ("script", "option"),
    [(SCRIPT, "instance_prompt"), ("train_network.py", "output_name")],
)
def test_a_value_of_several_words_is_refused(script: str, option: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several words: `a`, `dog`"):
        import_file(tmp_path, "a.sh", f"python {script} --{option} a dog --seed 3\n")
