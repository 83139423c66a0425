"""The README's first screen in a bare environment: what it installs is enough, and it prints what it promises.

    python tests/first_screen.py constraints.txt
    python tests/first_screen.py constraints-v4.txt

The environment is made in a temporary folder, and torch put into it first, as everywhere here. Constraints choose the
versions; the lines are the README's. `make test-install` runs both: they download a gigabyte or less.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def first_screen() -> tuple[str, str, str]:
    """The first line that installs, the first lines of Python, and what they promise to print."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    install = re.search(r"```bash\n(.*?)(?:\s+#.*)?\n```", readme)[1]
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    return install, code, re.search(r"^# (.*)$", code, re.MULTILINE)[1]


def main(constraints: str) -> None:
    install, code, promised = first_screen()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="llm2slm-install-") as folder:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {
            "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(ROOT / constraints),
            "HF_HOME": f"{folder}/hf",
            "HF_HUB_OFFLINE": "1",
        }

        def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
            return subprocess.run(command, cwd=ROOT, env=environment, check=True, text=True, **kwargs)

        run(sys.executable, "-m", "venv", folder)
        run("pip", "install", "-qq", "torch")
        run("sh", "-c", install.replace("pip install", "pip install -qq"))
        printed = run("python", "-c", code, stdout=subprocess.PIPE).stdout.strip()
    if printed.splitlines()[-1] != promised:
        sys.exit(f"The README promises\n  {promised}\nand with {constraints} it prints\n  {printed}")
    print(f"The README's first screen does what it promises with {constraints} ({time.monotonic() - started:.0f} s)")


if __name__ == "__main__":
    main(*sys.argv[1:])
