"""Installs what running the notebooks needs and is missing; the tests' packages are left out."""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

needed = Path("requirements.txt").read_text(encoding="utf-8").split("# Tests")[0]
have = {str(d.name).lower().replace("_", "-") for d in importlib.metadata.distributions()}
missing = [
    name + pin.strip()
    for name, pin in re.findall(r"^([A-Za-z][\w.-]*)([^#\n]*)", needed, re.MULTILINE)
    if name.lower() not in have
]
if missing:
    print("installing", *missing)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *missing], check=True)
