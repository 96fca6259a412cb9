"""Open a wheel and compare it with the sources: python look_in_wheel.py WHEEL (Python 3.11 or later).

pyproject.toml is read with tomllib here, which shows that the backend's own small reader understood it.
"""
import base64
import configparser
import csv
import email
import hashlib
import sys
import tomllib
import zipfile
from pathlib import Path

import backend

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

wheel = zipfile.ZipFile(sys.argv[1])
held = {name: wheel.read(name) for name in wheel.namelist()}
version = Path(sys.argv[1]).name.split("-")[1]
info = f"vastai-{version}.dist-info"
metadata = email.message_from_bytes(held[f"{info}/METADATA"])
scripts = configparser.ConfigParser()
scripts.read_string(held[f"{info}/entry_points.txt"].decode())
record = list(csv.reader(held[f"{info}/RECORD"].decode().splitlines()))
module = (ROOT / "vastai.py").read_bytes()


def recorded(name):
    if name == f"{info}/RECORD":
        return [name, "", ""]
    digest = base64.urlsafe_b64encode(hashlib.sha256(held[name]).digest()).rstrip(b"=").decode()
    return [name, f"sha256={digest}", str(len(held[name]))]


def same(what, got, want):
    print(f"{'same' if got == want else 'DIFFERENT'}: {what}")
    if got != want:
        sys.exit(f"  in the wheel: {got!r:.2000}\n  it should be: {want!r:.2000}")


same("names", sorted(held), sorted([
    "vastai.py", "vastai-stubs/__init__.pyi", "vastai_sdk.py", "vastai_sdk-stubs/__init__.pyi",
    f"{info}/METADATA", f"{info}/WHEEL", f"{info}/entry_points.txt", f"{info}/RECORD",
]))
same("vastai.py", held["vastai.py"], module)
same("vastai-stubs", held["vastai-stubs/__init__.pyi"], module)
same("vastai_sdk", held["vastai_sdk.py"], backend.SDK_MODULE)
same("vastai_sdk-stubs", held["vastai_sdk-stubs/__init__.pyi"], backend.SDK_STUBS)
same("RECORD", record, [recorded(name) for name in held])
same("scripts", dict(scripts["console_scripts"]), PROJECT["scripts"])
for field, values in {
    "Name": [PROJECT["name"]],
    "Version": [version],
    "Summary": [PROJECT["description"]],
    "Keywords": [",".join(PROJECT["keywords"])],
    "License-Expression": [PROJECT["license"]],
    "Project-URL": [f"{label}, {url}" for label, url in PROJECT["urls"].items()],
    "Classifier": PROJECT["classifiers"],
    "Requires-Python": [PROJECT["requires-python"]],
    "Requires-Dist": None,
    "Description-Content-Type": ["text/markdown; charset=UTF-8"],
}.items():
    same(field, metadata.get_all(field), values)
readme = (ROOT / PROJECT["readme"]).read_text(encoding="utf-8")
same("long description", metadata.get_payload(decode=True).decode(), readme)
