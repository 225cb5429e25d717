"""What an incomplete installation says."""

from training_helpers import run_python


def test_missing_operations_are_named_with_the_command_that_installs_them() -> None:
    result = run_python("import sys; sys.modules['grootvl_ops'] = None; import grootv")
    assert "ModuleNotFoundError: grootv needs the package grootvl_ops" in result.stderr
    assert "pip install ./ops ." in result.stderr
