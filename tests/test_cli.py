"""The command line: help that ends in runnable examples, unknown names, exit codes."""

import importlib

import pytest
import torch

import leaml_plugin
from leaml_plugin import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_exists_and_its_help_ends_in_examples(name, capsys):
    module = importlib.import_module(cli.COMMANDS[name][0])
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: leaml {name}" in text
    assert "examples:" in text
    assert f"leaml {name}" in module.EXAMPLES


def test_no_command_prints_help(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    for name in cli.COMMANDS:
        assert f"  {name} " in out


def test_unknown_command_is_suggested(capsys):
    assert cli.main(["adpt"]) == 2
    assert "did you mean 'adapt'" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert leaml_plugin.__version__ in capsys.readouterr().out


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "transformers", "extension", "devices", "cpu"):
        assert word in out


def test_show_settings(capsys):
    import json

    assert cli.main(["adapt", "--show-settings"]) == 0
    assert json.loads(capsys.readouterr().out)["finetune"]["train"]["steps"] > 0


def test_a_full_disk_is_one_sentence(monkeypatch, capsys):
    import errno

    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from leaml_plugin.commands import doctor

    def write(error):
        def main(args):
            raise error

        return main

    monkeypatch.setattr(doctor, "main", write(OSError(errno.ENOSPC, "No space left on device", "/runs/log.jsonl")))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "leaml: /runs/log.jsonl: the disk is full; make room and repeat the command.\n"
    monkeypatch.setattr(doctor, "main", lambda args: save_file({"x": torch.zeros(4)}, "/dev/full/x"))
    with pytest.raises((SafetensorError, OSError)):  # any other error stays what it is
        cli.main(["doctor"])
    monkeypatch.setattr(doctor, "main", write(SafetensorError("I/O error: No space left on device (os error 28)")))
    assert cli.main(["doctor"]) == 2
    assert "the disk is full" in capsys.readouterr().err
