"""The build backend of this project (PEP 517 and PEP 660): standard library only, any Python from 3.8 on.

Why not a published one: a lone module cannot carry `py.typed`, so type checkers ignore the annotations of an installed
copy. The wheel therefore holds vastai.py twice, once as `vastai-stubs/__init__.pyi`, which the published backends
have no setting for. It also adds `vastai_sdk`, the other name that programs import the SDK by.

All metadata stands in pyproject.toml, the version in vastai.py, and nothing of either is repeated here.
The same sources give the same bytes: no clock, no directory order and no file mode gets into an archive.
"""
import ast
import base64
import hashlib
import io
import os
import re
import tarfile
import time
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("vastai.py", "test_vastai.py", "pyproject.toml", "README.md", ".ci/backend.py")  # what an sdist holds
EPOCH_1980 = 315532800  # zip files know no earlier time

SDK_MODULE = b"""\
from vastai import *  # noqa: F403
from vastai import VastAI as VastAI
from vastai import other_name as __getattr__  # noqa: F401
"""

SDK_STUBS = b"""\
from vastai import *
from vastai import ServerlessRequest as ServerlessRequest
from vastai import VastAI as VastAI
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: vastai
Root-Is-Purelib: true
Tag: py3-none-any
"""


# ---- the hooks that pip, build and uv call -------------------------------------------------------------------------

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    module = read("vastai.py")
    return write_wheel(wheel_directory, {
        "vastai.py": module,
        "vastai-stubs/__init__.pyi": module,
        "vastai_sdk.py": SDK_MODULE,
        "vastai_sdk-stubs/__init__.pyi": SDK_STUBS,
    })


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """Like the wheel, but vastai.py stays where it is; a copy of it as stubs would only grow stale."""
    return write_wheel(wheel_directory, {
        "vastai.pth": f"{ROOT}\n".encode(),
        "vastai_sdk.py": SDK_MODULE,
    })


def build_sdist(sdist_directory, config_settings=None):
    stem = f"vastai-{version()}"
    files = {name: read(name) for name in SOURCES}
    files["PKG-INFO"] = core_metadata().encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in sorted(files):
            member = tarfile.TarInfo(f"{stem}/{name}")  # owner 0, mode 0644
            member.size, member.mtime = len(files[name]), timestamp()
            tar.addfile(member, io.BytesIO(files[name]))
    gzip = zlib.compressobj(wbits=31)  # not the module of that name, whose header differs between Python versions
    name = f"{stem}.tar.gz"
    Path(sdist_directory, name).write_bytes(gzip.compress(archive.getvalue()) + gzip.flush())
    return name


# ---- archives ------------------------------------------------------------------------------------------------------

def write_wheel(directory, files):
    """Write `files` (name: bytes) and the dist-info that describes them; return the wheel's name."""
    stem = f"vastai-{version()}"
    info = f"{stem}.dist-info"
    entry_points = ["[console_scripts]", *(f"{name} = {target}" for name, target in table("project.scripts").items())]
    files = {
        **dict(sorted(files.items())),
        f"{info}/METADATA": core_metadata().encode(),
        f"{info}/WHEEL": WHEEL.encode(),
        f"{info}/entry_points.txt": "\n".join([*entry_points, ""]).encode(),
    }
    record = [f"{name},{digest(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()

    name = f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(Path(directory, name), "w") as wheel:
        for path, data in files.items():
            member = zipfile.ZipInfo(path, time.gmtime(timestamp())[:6])
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3  # Unix, wherever this runs, so that the mode below counts
            member.external_attr = 0o100644 << 16
            wheel.writestr(member, data)
    return name


def digest(data):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def timestamp():
    return max(EPOCH_1980, int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH_1980)))


# ---- metadata ------------------------------------------------------------------------------------------------------

def core_metadata():
    """The text of METADATA and PKG-INFO."""
    project = table("project")
    return "\n".join([
        "Metadata-Version: 2.4",
        f"Name: {project['name']}",
        f"Version: {version()}",
        f"Summary: {project['description']}",
        f"Keywords: {','.join(project['keywords'])}",
        f"License-Expression: {project['license']}",
        *(f"Project-URL: {label}, {url}" for label, url in table("project.urls").items()),
        *(f"Classifier: {classifier}" for classifier in project["classifiers"]),
        f"Requires-Python: {project['requires-python']}",
        "Description-Content-Type: text/markdown; charset=UTF-8",
        "",
        text(project["readme"]),
    ])


def version():
    """The one `__version__ = "..."` at the start of a line of vastai.py: building must not need to run it."""
    found, = re.findall(r'^__version__(?:: str)? = "([0-9a-z.+]+)"', text("vastai.py"), re.M)
    return found


def table(name):
    """One table of pyproject.toml. There is no tomllib before Python 3.11, so its project tables keep to keys at the
    start of a line, strings and arrays of strings: values that TOML and Python write alike."""
    body = re.search(rf"^\[{re.escape(name)}\]\n(.*?)(?=^\[|\Z)", text("pyproject.toml"), re.M | re.S).group(1)
    pairs = re.findall(r'^("[^"]+"|[\w-]+) *= *(.+?)(?=^["\w#]|\Z)', body, re.M | re.S)
    return {key.strip('"'): ast.literal_eval(value.strip()) for key, value in pairs}


def read(name):
    return (ROOT / name).read_bytes()


def text(name):
    """The same with plain newlines, however the file was checked out."""
    return (ROOT / name).read_text(encoding="utf-8")
