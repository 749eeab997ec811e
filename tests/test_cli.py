"""Laws of the command line."""

import subprocess
import sys
import time

import pytest

from tokcom.cli.main import COMMANDS, main, usage


def test_the_list_of_commands_appears_within_a_second_and_imports_nothing_heavy():
    code = "import sys; from tokcom.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)
    assert time.perf_counter() - began < 5  # on a busy machine; 0.1 s on an idle one


def test_an_unknown_command_is_named_with_those_that_exist():
    with pytest.raises(SystemExit, match="no command 'generte'; it has generate, infill"):
        main(["generte"])


def test_every_command_says_what_it_does():
    for name, command in COMMANDS.items():
        assert f"{name} " in usage() and command.help in usage()


def test_a_leading_argument_is_the_text_or_the_prompt(monkeypatch):
    import tokcom.inference

    seen = []
    monkeypatch.setattr(tokcom.inference, "main", seen.append)
    main(["generate", "Once", "--seed", "1"])
    main(["generate", "--num_chunks", "4"])
    main(["infill", "a ____ b"])
    assert seen == [
        ["--mode", "conditional", "--prompt", "Once", "--seed", "1"],
        ["--mode", "generate", "--num_chunks", "4"],
        ["--mode", "infill", "--input_text", "a ____ b"],
    ]
    assert "generate" in COMMANDS and COMMANDS["generate"].first == ("--mode", "generate")
