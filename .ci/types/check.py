"""Do people who use the SDK get its types? Ask mypy and pyright, both strict, in the two ways there are to have it.

python check.py TOOLS_PYTHON WHEEL

TOOLS_PYTHON belongs to an environment with mypy and pyright. The programs beside this file are checked twice: with a
copy of vastai.py next to them, and with WHEEL installed in a new environment. A line that ends in `# E` must be found
faulty, and no other may be.
"""
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODULE = HERE.parent.parent / "vastai.py"
VENDORED = ["good.py", "wrong.py"]
INSTALLED = [*VENDORED, "other_name.py"]


def main(tools_python, wheel):
    failures = 0
    with tempfile.TemporaryDirectory() as name:
        vendored, installed, venv = (Path(name).resolve() / part for part in ("vendored", "installed", "venv"))
        vendored.mkdir()
        shutil.copy(MODULE, vendored)
        failures += compare("vendored copy", vendored, VENDORED, tools_python, Path(tools_python))

        installed.mkdir()
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        python = next(path for path in (venv / "bin" / "python", venv / "Scripts" / "python.exe") if path.exists())
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", wheel], check=True)
        failures += compare("installed wheel", installed, INSTALLED, tools_python, python)
    return failures


def compare(layout, folder, programs, tools_python, python):
    """Check the programs in this layout with each tool, say what it missed or made up, and count that."""
    for program in programs:
        shutil.copy(HERE / program, folder)
    expected = {(program, number) for program in programs
                for number, line in enumerate((HERE / program).read_text(encoding="utf-8").splitlines(), 1)
                if line.endswith("# E")}
    failures = 0
    for tool in (mypy, pyright):
        found = tool(tools_python, python, folder, programs)
        missed, invented = expected - found.keys(), found.keys() - expected
        for program, number in sorted(missed):
            print(f"{program}:{number}: {tool.__name__} finds no fault here")
        for program, number in sorted(invented):
            print(f"{program}:{number}: {tool.__name__}: {found[program, number]}")
        failures += len(missed) + len(invented)
        print(f"{layout}, {tool.__name__}: {len(expected) - len(missed)} of {len(expected)} mistakes found, "
              f"{len(invented)} false alarms in {len(programs)} programs")
    return failures


def mypy(tools_python, python, folder, programs):
    """{(file, line): message} of every error."""
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\ncache_dir = /dev/null\n")
    run = subprocess.run([tools_python, "-m", "mypy", "--python-executable", python, *programs],
                         cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if run.returncode not in (0, 1):
        sys.exit(f"mypy failed:\n{run.stdout}")
    errors = re.findall(r"^(.+?):(\d+): error: (.+)$", run.stdout, re.M)
    return {(file, int(line)): message for file, line, message in errors}


def pyright(tools_python, python, folder, programs):
    """{(file, line): message} of every error."""
    config = {"include": programs, "typeCheckingMode": "strict"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    run = subprocess.run([tools_python, "-m", "pyright", "--pythonpath", python, "--outputjson"],
                         cwd=folder, capture_output=True, text=True)
    if run.returncode not in (0, 1):
        sys.exit(f"pyright failed:\n{run.stdout}{run.stderr}")
    return {(Path(error["file"]).name, error["range"]["start"]["line"] + 1): error["message"]
            for error in json.loads(run.stdout)["generalDiagnostics"] if error["severity"] == "error"}


if __name__ == "__main__":
    sys.exit(bool(main(*sys.argv[1:])))
