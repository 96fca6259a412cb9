#!/usr/bin/env python3
"""Tests for `vastai.py`, and the simulated Vast.ai that they talk to.

    python3 test_vastai.py              run all tests, on up to four cores
    python3 test_vastai.py TestClass    run some of them, one after the other; takes unittest's arguments: -v, -k WORD
    python3 test_vastai.py demo         a guided tour of the command line, against a sandbox of its own
    python3 test_vastai.py sandbox      serve a sandbox until Ctrl-C: try everything without an account
    python3 test_vastai.py write        write what follows from the table: stubs, the README's list, the pinned surface
    python3 test_vastai.py bench        measure start-up, memory and calls
    python3 test_vastai.py worker       run the test classes whose names come on stdin; what runs on each core
    python3 test_vastai.py NAME --help  the options of any of these

The file in order:
  1. THE SIMULATED SERVICE: answers and refusals | query language: conditions, order, pages |
     goods: GPU models, offers, templates | instances | state: tables, and what they start with |
     routes: searching and renting | routes: instances | routes: copies, schedules, volumes, deployments |
     routes: hosts | routes: serverless | routes: the account | routes that need no function of their own |
     the market: state and routes together | HTTP server
  2. WHAT THE TESTS SHARE: in this process and as a process | a server that does what a script says |
     believable arguments for every row | terminals and shells
  3. TESTS: the table | the sandbox | every command, once in both faces | searching, renting and destroying |
     hosts: self-test | benchmarks, charges, copies, second factors | renting: clean up for certain |
     renting: the lease | renting: a machine that works | renting: a command on a machine |
     programs written for the official package | pure functions | faults: the transport |
     faults: what the caller learns | faults: threads and forks | faults: secrets and hostile text | faults: wrong use |
     faults: signals, streams, homes | faults: at random | serverless | completion and the prompt | invoices as PDF
  4. WHAT IS WRITTEN FROM THE TABLE: stubs, the README's list, the pinned surface | the pinned surface
  5. BENCHMARK: programs that are measured, and servers | measuring
  6. SUB-COMMANDS: sandbox | demo | all tests, on all cores | main

The sandbox is a small Vast.ai on a loopback port. It keeps state: what is rented appears in the list, boots, costs
money and can be destroyed. From a test it is used like this:

    with Sandbox(boot=0.2) as box:
        client = vastai.VastAI(api_key=box.key, server_url=box.url)
        box.fail("PUT /api/v0/asks/.*", status=503)         # the next request that matches gets this answer instead
        box.lose("PUT /api/v0/asks/.*")                     # the next one takes place, but its answer is lost
        box.machine(5, starts=False)                        # what is rented on machine 5 never runs; see BEHAVIOR
        row = box.offer(machine_id=6, dph_base=0.1)         # one more offer
        box.outbid(instance_id)                             # stopped, as somebody bids more
        box.workers(endpoint_id, 2)                         # two instances that work for an endpoint
        ...
        box.requests[-1]["body"]                            # everything that arrived, in order

Standard library only, CPython 3.8 and newer.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import atexit
import base64
import codecs
import collections
import contextlib
import csv
import dataclasses
import difflib
import email.utils
import faulthandler
import functools
import gc
import gzip
import hashlib
import http.client
import http.server
import inspect
import io
import itertools
import json
import operator
import os
import pathlib
import pickle
import py_compile
import pydoc
import random
import re
import select
import shlex
import shutil
import signal
import socket
import socketserver
import ssl
import stat
import statistics
import string
import struct
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import threading
import time
import tokenize
import traceback
import types
import unittest
import urllib.parse
import warnings
import zlib
from unittest import mock

import vastai

HERE = os.path.dirname(os.path.abspath(__file__))
HOUR, DAY = 3600, 86400
HOURS_PER_MONTH = 720  # as the service bills

# ==================================================================================================
# 1. THE SIMULATED SERVICE
# ==================================================================================================

# ----------------------------------------------------------------------------- answers and refusals


class Answer(Exception):
    """Raised to end a request at once with this status and this body (JSON, or text as it is)."""

    def __init__(self, status, body, headers=None):
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


class Refusal(Answer):
    """An error in the form that the service gives nearly all of them."""

    def __init__(self, status, error, msg, **extra):
        super().__init__(status, dict({"success": False, "error": error, "msg": msg}, **extra))


class Text(str):
    """An answer that is sent as text, not as a JSON string."""


class Call:
    """One request as the routes see it: query values are JSON where they can be, text otherwise."""

    def __init__(self, method, target, headers, raw):
        url = urllib.parse.urlsplit(target)
        self.method, self.path, self.headers = method, url.path, headers
        self.query = {name: decoded(value) for name, value in urllib.parse.parse_qsl(url.query, True)}
        self.body = decoded(raw.decode("utf-8", "replace")) if raw else None
        self.authorization = headers.get("Authorization", "")

    def record(self):
        """The entry for `Sandbox.requests`."""
        return {"method": self.method, "path": self.path, "query": self.query, "body": self.body,
                "headers": self.headers}

    def need(self, *names):
        """The named members of the body; a missing, null or empty one is refused."""
        for name in names:
            if self.body.get(name) in (None, "", []):
                raise Refusal(400, "invalid_args", f"Missing required field: {name}")
        return [self.body[name] for name in names] if len(names) > 1 else self.body[names[0]]


def decoded(text):
    """`text` as JSON where it is JSON, else as it is."""
    try:
        return json.loads(text)
    except ValueError:
        return text


# --------------------------------------------------------- query language: conditions, order, pages

COMPARISONS = {"gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}
OPERATORS = set(COMPARISONS) | {"eq", "neq", "in", "notin"}
NOT_CONDITIONS = {"order", "type", "limit", "allocated_storage", "disable_bundling", "select_cols"}


def number(value):
    """`value` as a number, or None: the service takes numbers as text too."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def driver_number(version):
    """570.124.04 -> 570124004: what makes driver versions comparable."""
    if not isinstance(version, str) or "." not in version:
        return number(version)
    return number("".join(part.zfill(3) for part in (version + ".0").split(".")[:3]))


def country_code(place):
    """'Sweden, SE' -> 'SE'; a bare code stays."""
    return place.rpartition(", ")[2] if isinstance(place, str) else place


# Fields that may be asked for but are not stored as such, and fields that are compared in another form.
DERIVED = {
    "verified": lambda row: row.get("verification") == "verified",
    "datacenter": lambda row: row.get("hosting_type") == 1,
    "ubuntu_version": lambda row: row.get("os_version"),
    "cuda_vers": lambda row: row.get("cuda_max_good"),
}
COMPARED_AS = {"driver_version": driver_number, "geolocation": country_code}


def same(have, want):
    """Equality as the service sees it: null counts as false, numbers may come as text."""
    if isinstance(have, bool) or isinstance(want, bool):
        return truth(have) == truth(want)
    if isinstance(have, (int, float)):
        return have == number(want)
    return have == want


def truth(value):
    return value.lower() in ("true", "1") if isinstance(value, str) else bool(value)


def meets(field, have, op, want):
    """Does the value `have` of one field meet one condition?"""
    if op not in OPERATORS:
        raise Refusal(400, "invalid_args", f"Invalid operator {op!r} for field {field!r}")
    if want == "any":
        return True
    form = COMPARED_AS.get(field, lambda value: value)
    have = form(have)
    if op in ("in", "notin"):
        if not isinstance(want, list):
            raise Refusal(400, "invalid_args", f"Field {field!r}: {op!r} needs a list")
        return any(same(have, form(item)) for item in want) == (op == "in")
    want = form(want)
    if op in ("eq", "neq"):
        return same(have, want) == (op == "eq")
    if have is None:
        return False
    if isinstance(have, (int, float)):
        have, want = float(have), number(want)
    if type(want) is not type(have):
        raise Refusal(400, "invalid_args", f"Invalid value for field {field!r}")
    return COMPARISONS[op](have, want)


def matching(rows, conditions):
    """The rows that meet all of {field: {op: value}}; a field that no row knows is refused by name."""
    known = set(DERIVED).union(*rows)
    for field, tests in (conditions or {}).items():
        if not isinstance(tests, dict):
            raise Refusal(400, "invalid_args", f"Invalid query: {field}, must be dict of conditions")
        if rows and field not in known:
            raise Refusal(400, "invalid_args", f"Invalid query: unknown field {field!r}")
        value = DERIVED.get(field, operator.methodcaller("get", field))
        known_rows, rows = rows, []
        for row in known_rows:
            if all(meets(field, value(row), op, want) for op, want in tests.items()):
                rows.append(row)
    return rows


def arranged(rows, order):
    """Rows sorted by [[field, "asc"|"desc"], ...] or [{"col", "dir"}, ...]; null comes last in either direction."""
    for part in reversed(order or []):
        try:
            field, direction = (part["col"], part.get("dir", "asc")) if isinstance(part, dict) else part
        except (KeyError, TypeError, ValueError):
            raise Refusal(400, "invalid_args", f"Invalid order {order!r}") from None
        if rows and not any(field in row for row in rows):
            raise Refusal(400, "invalid_args", f"Invalid order: unknown field {field!r}")
        present = [row for row in rows if row.get(field) is not None]
        absent = [row for row in rows if row.get(field) is None]
        numeric = all(isinstance(row[field], (int, float)) for row in present)
        present.sort(key=lambda row: row[field] if numeric else str(row[field]), reverse=direction == "desc")
        rows = present + absent
    return rows


def page_of(rows, query, default, most):
    """One page and the token of the next (None at the end). The token is opaque to clients."""
    token, limit = query.get("after_token"), query.get("limit", default)
    try:
        start = json.loads(base64.urlsafe_b64decode(token.encode()))["offset"] if token else 0
    except (AttributeError, ValueError, KeyError, TypeError):
        raise Refusal(400, "invalid_args", "Invalid after_token") from None
    if not isinstance(limit, int) or limit < 1:
        raise Refusal(400, "invalid_args", "limit must be a positive integer")
    end = start + min(limit, most)
    following = base64.urlsafe_b64encode(json.dumps({"offset": end}).encode()).decode() if end < len(rows) else None
    return rows[start:end], following


def columns(rows, wanted):
    """Rows cut down to `select_cols`, where that names columns."""
    if not wanted or "*" in wanted:
        return rows
    return [{name: row.get(name) for name in wanted} for row in rows]


# ------------------------------------------------------------- goods: GPU models, offers, templates


GpuModel = collections.namedtuple("GpuModel", "name ram cap dlperf tflops mem_bw watts pcie nvlink price counts")

# fmt: off
MODELS = [GpuModel(*row) for row in (
    # name        MB      cap   dlperf tflops GB/s  W    PCIe NVLink $/h   GPUs of each offer
    ("RTX 3060",  12288,  860,  12.4,  12.7,  330,  170, 4,   0,    0.062, (1, 1, 4)),
    ("RTX 3090",  24576,  860,  38.6,  35.6,  830,  350, 4,   0,    0.165, (1, 1, 2, 4)),
    ("RTX 4080",  16376,  890,  50.1,  48.7,  680,  320, 4,   0,    0.221, (1, 2)),
    ("RTX 4090",  24564,  890,  95.2,  82.6,  910,  450, 4,   0,    0.362, (1, 1, 1, 1, 1, 2, 4, 8)),
    ("RTX 5080",  16303,  1200, 62.3,  56.3,  890,  360, 5,   0,    0.274, (1,)),
    ("RTX 5090",  32607,  1200, 165.0, 104.8, 1550, 575, 5,   0,    0.531, (1, 1, 2, 4, 8)),
    ("RTX A6000", 49140,  860,  48.0,  38.7,  690,  300, 4,   0,    0.424, (1, 2, 4)),
    ("L40S",      46068,  890,  88.4,  91.6,  770,  350, 4,   0,    0.718, (1, 2, 4)),
    ("A100 PCIE", 81920,  800,  70.2,  19.5,  1550, 300, 4,   0,    0.824, (1, 2)),
    ("A100 SXM4", 81920,  800,  78.1,  19.5,  1720, 400, 4,   600,  0.983, (1, 4, 8)),
    ("H100 NVL",  95830,  900,  150.6, 60.3,  3350, 400, 5,   600,  2.047, (1, 2)),
    ("H100 SXM",  81559,  900,  165.3, 67.0,  2900, 700, 5,   900,  2.190, (1, 2, 8)),
    ("H200",      143771, 900,  180.2, 67.0,  4000, 700, 5,   900,  2.851, (1, 8)),
    ("B200",      183359, 1000, 320.8, 80.1,  7000, 999, 5,   1800, 4.203, (8,)),
)]
SITES = (  # geolocation, city, latitude, longitude
    ("Sweden, SE", "Luleå", 65.58, 22.15), ("California, US", "San Jose", 37.33, -121.89),
    ("Texas, US", "Dallas", 32.78, -96.8), ("Norway, NO", "Oslo", 59.91, 10.75),
    ("Germany, DE", "Falkenstein", 50.48, 12.37), ("Czechia, CZ", "Brno", 49.2, 16.61),
    ("Taiwan, TW", "Taipei", 25.03, 121.57), ("Japan, JP", "Osaka", 34.69, 135.5),
    ("Quebec, CA", "Montréal", 45.5, -73.57), ("Iceland, IS", "Reykjavík", 64.15, -21.94),
    ("Bulgaria, BG", "Sofia", 42.7, 23.32), ("South Korea, KR", "Seoul", 37.57, 126.98),
)
CPUS = (("AMD EPYC 7402 24-Core Processor", 48, 2.8, "ROME2D32GM-2T"), ("AMD EPYC 9354 32-Core", 64, 3.25, "H13SSL-NT"),
        ("Xeon® Gold 6338", 64, 2.0, "X12DPG-OA6"), ("AMD Ryzen 9 7950X", 32, 4.5, "ProArt X670E-CREATOR"))
DISKS = ("Samsung SSD 990 PRO", "KIOXIA KCD8XPUG3T84", "WD_BLACK SN850X", "INTEL SSDPF2KX038TZ")
DRIVERS = (("535.183.01", 12.2), ("550.127.05", 12.4), ("560.35.03", 12.6), ("570.124.04", 12.8), ("580.65.06", 13.0))
TEMPLATES = (  # name, image, tag, runtype, disk GB
    ("PyTorch (cuDNN Devel)", "vastai/pytorch", "2.6.0-cuda-12.4.1", "ssh", 32),
    ("NVIDIA CUDA", "vastai/base-image", "cuda-12.8.1-auto", "ssh", 16),
    ("Ubuntu 22.04 VM", "docker.io/vastai/kvm", "ubuntu_cli_22.04", "ssh", 48),
    ("vLLM", "vllm/vllm-openai", "v0.8.5", "args", 64),
    ("SGLang", "lmsysorg/sglang", "v0.4.6", "args", 64),
    ("Text Generation Inference", "ghcr.io/huggingface/text-generation-inference", "3.2.3", "args", 64),
    ("ComfyUI", "vastai/comfy", "v0.3.30", "jupyter", 80),
    ("Stable Diffusion WebUI Forge", "vastai/sd-forge", "latest", "jupyter", 80),
    ("Open WebUI (Ollama)", "vastai/openwebui", "v0.6.5", "jupyter", 64),
    ("Whisper Server", "onerahmet/openai-whisper-asr-webservice", "v1.8.2-gpu", "args", 16),
    ("Jupyter with R", "quay.io/jupyter/r-notebook", "2025-03-31", "jupyter", 16),
    ("Blender Batch Renderer", "nytimes/blender", "3.3.1-gpu-ubuntu18.04", "ssh", 40),
)
# fmt: on


def all_offers(now):
    """The same offers every time, 42 of them."""
    rng = random.Random(20090)
    return [new_offer(rng, model, nth < (len(model.counts) + 1) // 2, num_gpus, now)
            for model in MODELS for nth, num_gpus in enumerate(model.counts)]


def new_offer(rng, model, sure, num_gpus, now):
    """One offer; the `sure` ones of each model are verified and free, so that a search by model finds some."""
    cpu, cores, ghz, mobo = rng.choice(CPUS)
    driver, cuda = rng.choice(DRIVERS[3:] if model.cap >= 1000 else DRIVERS)
    place = rng.choice(SITES)[0]
    verification = "verified" if sure else rng.choice(["verified"] * 8 + ["unverified", "deverified"])
    secure = verification == "verified" and ((model.watts > 350 and model.price > 0.9) or rng.random() < 0.25)
    price = round(model.price * num_gpus * rng.uniform(0.9, 1.25) * (1.1 if secure else 1), 4)
    frac = rng.choice((1.0, 1.0, 0.5, 0.25)) if num_gpus < 8 else 1.0
    cores_effective = round(max(cores * frac, num_gpus * 4.0), 1)
    offer_id, host_id, days = rng.randrange(8000000, 30000000), rng.randrange(1000, 400000), rng.randrange(3, 120)
    rented = not sure and rng.random() < 0.1
    reliability = round(rng.uniform(0.991, 0.9998) if verification == "verified" else rng.uniform(0.8, 0.99), 4)
    return {
        "id": offer_id, "ask_contract_id": offer_id, "bundle_id": rng.randrange(10**8, 10**9), "bundled_results": None,
        "bw_nvlink": model.nvlink if num_gpus > 1 else 0, "cluster_id": None, "compute_cap": model.cap,
        "cpu_arch": "amd64", "cpu_cores": max(cores, num_gpus * 8), "cpu_cores_effective": cores_effective,
        "cpu_ghz": ghz, "cpu_name": cpu, "cpu_ram": int(max(model.ram * num_gpus * rng.uniform(1.2, 2.6), 31900)),
        "credit_discount_max": rng.choice((0.1, 0.25, 0.4)), "cuda_max_good": cuda,
        "direct_port_count": rng.randrange(8, 500), "discount_rate": 0.05 * rng.randrange(1, 5),
        "disk_bw": round(rng.uniform(900, 7200), 1), "disk_name": rng.choice(DISKS),
        "disk_space": round(rng.uniform(180, 900) * num_gpus, 1), "dlperf": round(model.dlperf * num_gpus, 2),
        "dph_base": price, "driver_version": driver, "driver_vers": int(driver_number(driver)),
        "duration": float(days * DAY), "end_date": now + days * DAY, "external": None, "geolocation": place,
        "geolocode": rng.randrange(10**7, 10**8), "gpu_arch": "nvidia", "gpu_display_active": False, "gpu_frac": frac,
        "gpu_ids": [rng.randrange(1000, 99999) for _ in range(num_gpus)], "gpu_lanes": 16, "gpu_mem_bw": model.mem_bw,
        "gpu_name": model.name, "gpu_ram": model.ram, "gpu_total_ram": model.ram * num_gpus,
        "gpu_max_power": model.watts, "gpu_max_temp": 84, "has_avx": 1, "host_id": host_id,
        "hosting_type": int(secure), "hostname": None, "inet_down": round(rng.uniform(420, 9000), 1),
        "inet_down_cost": round(rng.uniform(0, 0.004), 5), "inet_up": round(rng.uniform(300, 8000), 1),
        "inet_up_cost": round(rng.uniform(0, 0.006), 5), "is_bid": False, "machine_id": rng.randrange(1000, 50000),
        "min_bid": round(price * rng.uniform(0.35, 0.6), 4), "mobo_name": mobo, "num_gpus": num_gpus,
        "os_version": rng.choice(("22.04", "24.04")), "pci_gen": model.pcie,
        "pcie_bw": round(model.pcie * rng.uniform(5.2, 6.6), 1),
        "public_ipaddr": f"203.0.113.{rng.randrange(2, 255)}", "reliability": reliability,
        "reliability2": reliability, "rentable": not rented, "rented": rented, "rn": 1, "start_date": now - 30 * DAY,
        "static_ip": rng.random() < 0.7, "storage_cost": round(rng.uniform(0.1, 0.2), 3),
        "total_flops": round(model.tflops * num_gpus, 2), "vericode": int(verification == "verified"),
        "verification": verification, "vms_enabled": rng.random() < 0.2, "webpage": None,
    }


def priced(offer, kind="on-demand", storage=5.0):
    """The offer as a search answers it: its prices depend on the kind of rental and on the disk that goes with it."""
    gpus = offer["min_bid"] if kind == "bid" else offer["dph_base"]
    disk = offer["storage_cost"] * storage / HOURS_PER_MONTH
    total, reserved = gpus + disk, gpus * (1 - offer["discount_rate"]) + disk
    return dict(
        offer, is_bid=kind == "bid", dph_base=gpus, dph_total=round(total, 6), storage_total_cost=disk,
        discounted_dph_total=round(reserved, 6), dlperf_per_dphtotal=round(offer["dlperf"] / total, 2),
        flops_per_dphtotal=round(offer["total_flops"] / total, 2),
        score=round(offer["dlperf"] / total * offer["reliability"] ** 4, 2),
        search={"gpuCostPerHour": gpus, "diskHour": disk, "totalHour": total,
                "discountTotalHour": total - reserved, "discountedTotalPerHour": reserved})


def volume_offer(offer, offer_id):
    """A volume on the machine of a GPU offer."""
    names = ("cluster_id cpu_arch cpu_ghz cpu_name cuda_max_good disk_bw disk_name driver_version driver_vers duration "
             "end_date external geolocation gpu_arch has_avx host_id hosting_type inet_down inet_up machine_id "
             "os_version pci_gen pcie_bw reliability reliability2 static_ip storage_cost total_flops verification")
    row = {name: offer[name] for name in names.split()}
    return dict(row, id=offer_id, ask_contract_id=offer_id, disk_space=round(offer["disk_space"] / 4, 1),
                score=offer["dlperf"], nw_disk_min_bw=None, nw_disk_max_bw=None, nw_disk_avg_bw=None)


def network_volume_offer(offer, offer_id, cluster_id):
    """A volume on the shared storage of a cluster."""
    speed = offer["disk_bw"]
    return dict(volume_offer(offer, offer_id), disk_space=40960.0, cluster_id=cluster_id, nw_disk_min_bw=speed / 4,
                nw_disk_avg_bw=speed / 2, nw_disk_max_bw=speed)


def new_template(fields, template_id, creator_id, now):
    """A template row; its hash depends on its content, so that every change makes a new one."""
    row = dict.fromkeys("name image tag default_tag href repo env onstart jupyter_dir docker_login_repo "
                        "recent_create_date".split())
    row.update(id=template_id, creator_id=creator_id, created_at=now, count_created=0, runtype="ssh", ssh_direct=True,
               jup_direct=False, use_ssh=True, use_jupyter_lab=False, extra_filters="{}", recommended_disk_space=8.0,
               recommended=False, readme="", readme_visible=True, desc="", private=False)
    row.update((name, value) for name, value in fields.items() if name in row and name != "id")
    if not isinstance(row["extra_filters"], str):
        row["extra_filters"] = json.dumps(row["extra_filters"])
    row["hash_id"] = digest(row)
    return row


def image_of(template):
    return f"{template['image']}:{template['tag']}" if template["tag"] else template["image"]


def digest(*parts):
    """32 hex digits that follow from the parts: believable ids and tokens, the same in every run."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


# ---------------------------------------------------------------------------------------- instances

COPIED_FROM_OFFER = (
    "bundle_id bw_nvlink cluster_id compute_cap cpu_arch cpu_cores cpu_cores_effective cpu_name cpu_ram cuda_max_good "
    "direct_port_count disk_bw disk_name dlperf driver_version end_date external geolocation gpu_arch gpu_frac "
    "gpu_lanes gpu_mem_bw gpu_name gpu_ram host_id hosting_type inet_down inet_down_cost inet_up inet_up_cost "
    "machine_id min_bid mobo_name num_gpus os_version pci_gen pcie_bw reliability2 rentable static_ip storage_cost "
    "total_flops verification vericode webpage").split()
FILES = {"/root/onstart.sh": 214, "/workspace/train.py": 5187, "/workspace/data/tokens.bin": 412090368,
         "/workspace/checkpoints/epoch-1.pt": 268512744, "/workspace/checkpoints/epoch-2.pt": 268512744}


# What a machine, or one instance, does in place of what a good one does; see Sandbox.machine.
BEHAVIOR = {
    "starts": True,  # False: it loads forever; a number: seconds until it runs
    "message": None,  # its status_msg as long as it does not run
    "status": None,  # its actual_status, whatever happens: "offline", "unknown", "exited", "created"
    "hidden": 0,  # seconds after the rental in which the service does not know the new id yet
    "hidden_as": None,  # what it says then: None for an instance that is null, or 404
    "outbid": None,  # seconds after the start until somebody bids more
    "address": None,  # (host, port) to which all its ports lead
    "differs": {},  # members of its row that are not as ordered: {"disk_space": 8.0, "is_bid": False}
}


class Instance:
    """A rented instance: the facts of the contract, and the few times from which everything else follows."""

    def __init__(self, contract_id, offer, terms, template, now):
        self.id, self.offer, self.keys, self.files = contract_id, offer, {}, dict(FILES)
        self.made = self.started = self.billed = now
        self.behavior, self.halted = dict(BEHAVIOR), ""
        self.writeable_path = f"/var/lib/docker/overlay2/{digest(contract_id)[:12]}/diff"
        self.goal = "stopped" if terms.get("target_state") == "stopped" else "running"
        self.row = {name: offer[name] for name in COPIED_FROM_OFFER}
        self.row.update(
            id=contract_id, start_date=now, label=terms.get("label"), is_bid=terms.get("price") is not None,
            disk_space=float(terms.get("disk") or 10), gpu_totalram=offer["gpu_total_ram"], credit_balance=None,
            image_args=terms.get("args") or [], country_code=country_code(offer["geolocation"]), volume_info=[],
            jupyter_token=digest("jupyter", contract_id) * 2, local_ipaddrs="10.0.0.5 172.17.0.2 \n",
            ssh_idx=str(contract_id % 9 + 1), ssh_host=f"ssh{contract_id % 9 + 1}.vast.ai",
            ssh_port=10000 + contract_id % 30000 // 2 * 2, machine_dir_ssh_port=20000 + contract_id % 10000)
        self.configure(terms, template)
        self.price(terms.get("price"))

    def configure(self, terms, template=None):
        """Takes image, environment and the like from the terms, else from the template, else leaves them."""
        image = terms.get("image") or (image_of(template) if template else self.row.get("image_uuid"))
        template = template or {}
        env = terms.get("env")
        if isinstance(env, str):
            env = {name or f"-p {port}": value or "1"
                   for name, value, port in re.findall(r"-e\s+(\w+)=(\S+)|-p\s+([\d:/a-z]+)", env)}
        self.row.update(
            image_uuid=image, onstart=terms.get("onstart") or template.get("onstart") or self.row.get("onstart"),
            image_runtype=terms.get("runtype") or template.get("runtype") or self.row.get("image_runtype") or "ssh")
        if env is not None or "extra_env" not in self.row:
            self.row["extra_env"] = [[name, str(value)] for name, value in (env or {}).items()]
        if template or "template_id" not in self.row:
            self.row.update(template_id=template.get("id"), template_hash_id=template.get("hash_id"),
                            template_name=template.get("name"))

    def price(self, bid=None):
        """Works out what an hour costs: on demand, or at this bid."""
        gpus = self.offer["dph_base"] if bid is None else float(bid)
        self.disk_per_hour = self.row["storage_cost"] * self.row["disk_space"] / HOURS_PER_MONTH
        total = gpus + self.disk_per_hour
        costs = {"gpuCostPerHour": gpus, "diskHour": self.disk_per_hour, "totalHour": total, "discountTotalHour": 0.0,
                 "discountedTotalPerHour": total}
        self.row.update(dph_base=gpus, dph_total=round(total, 6), search=costs, instance=costs, score=None,
                        storage_total_cost=self.disk_per_hour,
                        flops_per_dphtotal=round(self.row["total_flops"] / total, 2),
                        dlperf_per_dphtotal=round(self.row["dlperf"] / total, 2))

    def bill(self, now):
        """What has become due since the last time; a stopped instance pays for its disk only."""
        hours, self.billed = (now - self.billed) / HOUR, now
        return hours * (self.row["dph_total"] if self.goal == "running" else self.disk_per_hour)

    def set_goal(self, goal, now):
        if goal == "running" and self.goal != "running":
            self.started = now
        self.goal = goal

    def halt(self, why):
        """The market stops it: somebody bids more, or the credit is used up."""
        self.goal, self.halted = "stopped", why

    def pass_time(self, now):
        """What has happened by itself since the last look."""
        outbid = self.behavior["outbid"]
        if outbid is not None and self.goal == "running" and now - self.started >= outbid:
            self.offer["min_bid"] = round(1.5 * self.row["dph_base"], 4)
            self.behavior["outbid"] = None
            self.halt("outbid")

    def is_hidden(self, now):
        return now - self.made < self.behavior["hidden"]

    def status(self, now, boot):
        starts = self.behavior["starts"]
        if self.behavior["status"]:
            return self.behavior["status"]
        if self.goal == "stopped":
            return "created" if self.halted == "low bid" else "exited"
        age = now - self.started
        boot = boot if starts is True else float("inf") if starts is False else starts
        return "created" if age < min(boot, 4.0) / 4 else "loading" if age < boot else "running"

    def ports(self):
        """Published ports: those asked for with -p, and ssh and Jupyter where they are direct."""
        runtype, first = self.row["image_runtype"], 40000 + self.id % 2000 * 10
        inner = ["22/tcp"] * ("_direc" in runtype) + ["8080/tcp"] * ("jupyter_direc" in runtype)
        for name, _ in self.row["extra_env"]:
            asked = re.match(r"-p \d+:(\d+)(/\w+)?$", name)
            inner += [asked.group(1) + (asked.group(2) or "/tcp")] if asked else []
        if self.behavior["address"]:
            return {port: [{"HostIp": "0.0.0.0", "HostPort": str(self.behavior["address"][1])}] for port in inner}
        return {port: [{"HostIp": host, "HostPort": str(first + nth)} for host in ("0.0.0.0", "::")]
                for nth, port in enumerate(inner)}

    def view(self, now, boot):
        """The row as the service answers it at this moment."""
        status, address = self.status(now, boot), self.behavior["address"] or (self.offer["public_ipaddr"], None)
        running, image = status == "running", self.row["image_uuid"]
        message = {"loading": f"Pulling from {image.partition(':')[0]}",
                   "running": f"success, running {image}/{self.row['image_runtype'].split('_')[0]}",
                   "exited": "success, stopped by user"}.get(status)
        if not running and self.behavior["message"]:
            message = self.behavior["message"]
        uptime = max(0.0, now - self.started - boot) / 60 if running else None
        view = dict(
            self.row, actual_status=status, cur_state=self.goal, next_state=self.goal, intended_status=self.goal,
            status_msg=message, uptime_mins=uptime, ports=self.ports() if running else None,
            public_ipaddr=address[0] if status != "created" else None,
            duration=max(0.0, self.row["end_date"] - now), time_remaining="", host_run_time=2592000.0,
            cpu_util=0.11 if running else 0.0, gpu_util=72.0 if running else None, gpu_temp=61.0 if running else None,
            mem_limit=self.row["cpu_ram"] / 1024, mem_usage=3.25 if running else None,
            vmem_usage=0.54 if running else None, disk_usage=round(sum(self.files.values()) / 1e9, 2),
            disk_util=round(sum(self.files.values()) / 1e9 / self.row["disk_space"], 3))
        return {**view, **self.behavior["differs"]}

    def container_log(self, now):
        """What the container wrote since it was started: one line a second once it trains, at most a thousand."""
        since, row = self.started, self.row
        lines = [(0, f"container {self.id} starting, image {row['image_uuid']}"),
                 (0, f"found {row['num_gpus']} x {row['gpu_name']}, driver {row['driver_version']}")]
        for step in range(1, min(1000, 3 + int(now - since)) if self.behavior["starts"] else 1):
            lines.append((step, f"step {step:5d} loss={0.4 + 8.0 / (step + 2):.4f} lr=3.0e-04"))
            if step % 50 == 0:
                lines.append((step, "WARN: dataloader is slower than the GPU"))
        return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(since + second))} {text}" for second, text in lines]

    def daemon_log(self):
        end = "OK" if self.behavior["starts"] is not False else self.behavior["message"] or "…"
        return [f"[kaalia] instance C.{self.id} requested", "[kaalia] docker pull " + self.row["image_uuid"],
                f"[kaalia] docker run --gpus {self.row['num_gpus']} {end}"]

    def shell(self, command):
        """`execute`: only ls, du and rm are allowed there."""
        try:
            program, *words = shlex.split(command)
        except ValueError:
            program, words = "", []
        options = "".join(word.lstrip("-") for word in words if word.startswith("-"))
        path = "/" + next((word for word in words if not word.startswith("-")), "").strip("/")
        below = [name for name in self.files if name == path or name.startswith(path.rstrip("/") + "/")]
        if program not in ("ls", "du", "rm"):
            raise Refusal(400, "invalid_args", "Invalid command given. Only ls, rm and du are supported.")
        if not below:
            return f"{program}: cannot access '{path}': No such file or directory\n"
        return getattr(self, "shell_" + program)(path, below, options)

    def shell_ls(self, path, below, options):
        entries = {}
        for name in below:
            entry = name[len(path.rstrip("/")) + 1:].split("/")[0] or name
            entries[entry] = entries.get(entry, 0) + self.files[name]
        if "l" not in options:
            return "".join(entry + "\n" for entry in sorted(entries))
        return "".join(f"-rw-r--r-- 1 root root {entries[entry]:>10} Jan  8 09:30 {entry}\n"
                       for entry in sorted(entries))

    def shell_du(self, path, below, options):
        size = sum(self.files[name] for name in below) // 1024
        shown = f"{size // 1024}M" if "h" in options else str(size)
        return f"{shown}\t{self.writeable_path}{path}\n"

    def shell_rm(self, path, below, options):
        if below != [path] and "r" not in options:
            return f"rm: cannot remove '{path}': Is a directory\n"
        for name in below:
            del self.files[name]
        return ""


# ---------------------------------------------------------- state: tables, and what they start with


class State:
    """Everything the simulated service knows, and what it starts with. The routes read and change it."""

    def __init__(self, key, credit, boot, clock):
        self.key, self.boot, self.now, self.url = key, boot, clock, ""
        self.born, self.ids = clock(), itertools.count(30000001)
        self.results, self.secrets, self.team, self.preferences = {}, {"HF_TOKEN": "hf_example"}, None, {}
        self.behaviours = collections.defaultdict(dict)  # {machine id, or None for all: {name: value of BEHAVIOR}}
        self.tables = collections.defaultdict(dict)
        self.user = {
            "id": 204455, "username": "ada", "email": "ada@example.com", "fullname": "Ada Example", "ssh_key": None,
            "email_verified": True, "balance": 0.0, "credit": credit, "balance_threshold": 0.0,
            "balance_threshold_enabled": False, "billaddress_line1": "1 Analytical Way", "billaddress_line2": "",
            "billaddress_city": "London", "billaddress_zip": "N1 9GU", "billaddress_country": "GB",
            "billed_expected": 0.0, "billed_verified": 0.0, "billing_creditonly": 1, "can_pay": True,
            "got_signup_credit": 1, "has_billing": True, "has_payout": False, "last4": "4242", "paid_expected": 0.0,
            "paid_verified": 0.0, "password_resettable": True, "paypal_email": None, "key_id": 5150, "sid": "sandbox"}
        self.seed_goods()
        self.seed_account()
        self.seed_host()

    def seed_goods(self):
        offers = all_offers(self.born)
        self.tables["offers"] = {offer["id"]: offer for offer in offers}
        for nth, offer in enumerate(offers[::3]):
            self.add("volume_offers", volume_offer(offer, 8800000 + nth))
        for nth, offer in enumerate(offers[::9]):
            self.add("network_offers", network_volume_offer(offer, 5500000 + nth, 31 + nth))
        for nth, (name, image, tag, runtype, disk) in enumerate(TEMPLATES):
            self.add("templates", new_template(
                {"name": name, "image": image, "tag": tag, "runtype": runtype, "recommended_disk_space": float(disk),
                 "recommended": nth < 6, "jup_direct": runtype == "jupyter", "desc": name + ", ready to run"},
                88200 + nth, 1, self.born - (90 - nth) * DAY))
        for nth, offer in enumerate(offers):
            template = self.tables["templates"][88203 + nth % 3]
            self.add("benchmarks", {
                "id": 500 + nth, "machine_id": offer["machine_id"], "gpu_name": offer["gpu_name"], "type": "perf",
                "num_gpus": offer["num_gpus"], "value": round(offer["dlperf"] * 1.6, 2), "dph_base": offer["dph_base"],
                "template_hash": template["hash_id"], "template_id": template["id"], "contract_id": 6600000 + nth,
                "image": image_of(template), "last_update": self.born - nth * DAY, "launch_args": None})
        for gpu_name, age, goal in (("RTX 4090", 2, "running"), ("RTX 3090", 9, "stopped")):
            offer = [row for row in offers if row["gpu_name"] == gpu_name and row["num_gpus"] == 1][-1]
            instance = self.new_instance(offer, {
                "image": "vastai/pytorch:2.6.0-cuda-12.4.1", "disk": 40, "runtype": "ssh_direc ssh_proxy",
                "env": {"TZ": "UTC", "-p 8080:8080": "1"}, "label": {"running": "training", "stopped": None}[goal]})
            instance.row["start_date"] = instance.started = self.born - age * DAY
            instance.goal = goal

    def seed_account(self):
        running, stopped = self.tables["instances"].values()
        ssh_key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIExampleExampleExampleExampleExample00 ada@lab"
        self.add("ssh_keys", {"id": 321, "user_id": self.user["id"], "key": ssh_key, "public_key": ssh_key,
                              "created_at": self.days_ago(40), "deleted_at": None})
        self.add("api_keys", {"id": 5150, "user_id": self.user["id"], "name": "default", "rights": "all",
                              "team_id": None, "team_name": None, "permissions": {}})
        self.add("subaccounts", {"id": 5001, "email": "grace@example.com", "username": "grace", "credit": 0.0,
                                 "parent_id": self.user["id"], "key_id": 5151, "created_at": self.days_ago(20),
                                 "deleted_at": None})
        self.team = {"id": 8812, "name": "Example Lab"}
        self.add("members", {"id": self.user["id"], "username": "ada", "email": "ada@example.com",
                             "fullname": "Ada Example", "roles": ["team_owner"]})
        self.add("members", {"id": 204456, "username": "kim", "email": "kim@example.org", "fullname": None,
                             "roles": ["developer"]})
        self.add("roles", {"id": 91, "name": "developer", "identifier": "developer",
                           "permissions": {"api": {"user_read": {}, "instance_write": {}, "misc": {}}}})
        self.add("tfa_methods", {"id": 77, "user_id": self.user["id"], "is_primary": True, "method": "totp",
                                 "label": "Phone", "phone_number": None, "created_at": self.born - 90 * DAY,
                                 "last_used": self.born - DAY, "fail_count": 0, "locked_until": None})
        for nth, (name, kind) in enumerate((("datasets", "s3"), ("drive", "drive"), ("models", "hf"))):
            self.add("connections", {"id": 1001 + nth, "name": name, "cloud_type": kind})
        for nth in range(24):
            self.add("payments", new_payment(nth, self.user, self.born))
        for nth in range(14):
            for instance in (running, stopped)[:1 if nth < 9 else 2]:
                self.add("charges", new_charge(instance, nth, self.born))
        for address, place in (("198.51.100.7", "London, GB"), ("2001:db8::1", None)):
            self.add("addresses", {"user_id": self.user["id"], "ip": address, "first_seen": self.days_ago(40),
                                   "first_location": place})
        for key, name in NOTIFICATIONS.items():
            context, slug = key.split(":")
            self.add("notification_types", {
                "id": key, "key": key, "slug": slug, "context": context, "topic": "account", "category": "account",
                "display_name": name, "default_preferences": {"email": True, "webhooks": False},
                "mandatory_email": False})
        self.add("backups", {"id": 30, "contract_id": running.id, "type": "instance", "created_at": self.born - DAY,
                             "machine_id": running.row["machine_id"], "status": "success", "info": "3 files"})
        self.add("price_increases", {
            "id": 999, "pending_price_increase_id": 999, "contract_id": running.id, "host_id": running.row["host_id"],
            "old_gpu_costpersec": running.row["dph_base"] / HOUR, "new_gpu_costpersec": running.row["dph_base"] / 3000,
            "old_disk_ram_costpersec": 5e-08, "new_disk_ram_costpersec": None, "old_bwu_cost": 0.01,
            "new_bwu_cost": 0.02, "old_bwd_cost": None, "new_bwd_cost": 0.025, "old_platform_fee": 0.1,
            "new_platform_fee": 0.15, "contract_end_date": running.row["end_date"],
            "ask_end_date": running.row["end_date"] + 30 * DAY, "created_at": self.born - HOUR})

    def seed_host(self):
        offers = list(self.tables["offers"].values())
        big = next(row for row in offers if row["gpu_name"] == "RTX 4090" and row["num_gpus"] == 8)
        small = next(row for row in offers if row["gpu_name"] == "H100 SXM")
        for offer, hostname in ((big, "rack-07-node-b.example.net"), (small, "h1.example.net")):
            offer["host_id"] = self.user["id"]
            same = ("num_gpus gpu_name disk_space driver_version reliability2 verification public_ipaddr geolocation "
                    "credit_discount_max")
            row = {name: offer[name] for name in same.split()}
            self.add("machines", dict(
                row, id=offer["machine_id"], hostname=hostname, num_reports=1, error_description=None, listed=True,
                listed_gpu_cost=round(offer["dph_base"] / offer["num_gpus"], 3), earn_hour=0.0, clients=[],
                min_bid_price=round(offer["min_bid"] / offer["num_gpus"], 3), gpu_occupancy="x_" * offer["num_gpus"],
                listed_inet_up_cost=offer["inet_up_cost"], listed_inet_down_cost=offer["inet_down_cost"]))
        self.add("clusters", {"id": 12, "subnet": "10.11.0.0/24",
                              "nodes": cluster_nodes("10.11.0.0/24", self.tables["machines"])})
        self.add("overlays", {"id": 31, "overlay_id": 31, "name": "mesh-a", "internal_subnet": "172.20.0.0/16",
                              "cluster_id": 12, "instances": []})
        self.add("network_disks", {"id": 77, "machines": list(self.tables["machines"]), "mount_point": "/mnt/disk1"})
        group = {"endpoint_name": "my-endpoint", "template_id": 88203, "search_params": "gpu_name=RTX_4090"}
        call = Call("POST", "/", {}, json.dumps(group).encode())
        endpoint = self.create_endpoint(call)["result"]
        group_id = self.create_workergroup(call)["id"]
        offer, terms = self.rows("instances")[0].offer, {"label": group["endpoint_name"], "disk": 16}
        worker = Instance(next(self.ids), offer, terms, None, self.born)
        for nth in (2, 3):  # what a worker cost that is gone
            self.add("charges", new_charge(worker, nth, self.born, endpoint_id=endpoint, workergroup_id=group_id))
        self.add("deployments", {
            "id": 644, "name": "square", "tag": "default", "image": "vastai/base-image:cuda-12.8.1-auto",
            "endpoint_id": endpoint, "env": "-e A=1", "file_hash": digest("square")[:16],
            "s3_key": "deployments/644.tar.gz", "search_params": "gpu_name=RTX_4090",
            "current_version_id": 1202, "last_healthy_version_id": 1201, "storage": 16.0, "ttl": None,
            "last_client_heartbeat": None, "created_at": self.born - 3 * DAY,
            "updated_at": self.born - DAY, "endpoint_state": "active", "worker_count": 2})

    # Rows: every table is a dict id -> row (instances are objects), so that one set of helpers serves all.

    def rows(self, table):
        return list(self.tables[table].values())

    def add(self, table, row):
        """Puts a row into a table, with a new id unless it has one."""
        if "id" not in row:
            row["id"] = next(self.ids)
        self.tables[table][row["id"]] = row
        return row

    def find(self, table, row_id):
        """The row, or 404 with words that name what is missing: 'ssh_keys' -> 'No such ssh key 7'."""
        if row_id not in self.tables[table]:
            noun = table[:-1].replace("_", " ")
            raise Refusal(404, "no_such_" + table[:-1], f"No such {noun} {row_id}")
        return self.tables[table][row_id]

    def remove(self, table, row_id):
        self.find(table, row_id)
        return self.tables[table].pop(row_id)

    def find_template(self, hash_id=None, template_id=None):
        for template in self.rows("templates"):
            if template["hash_id"] == hash_id or (hash_id is None and template["id"] == template_id):
                return template
        raise Refusal(404, "not_found", "Template not found")

    @staticmethod
    def stamp(at):
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))

    def days_ago(self, days):
        return self.stamp(self.born - days * DAY)

    # Money and results

    def spend(self, amount, status=400):
        """Takes it from the credit, or refuses."""
        if amount is None or not amount >= 0:
            raise Refusal(400, "invalid_args", "Invalid amount")
        if amount > self.user["balance"] + self.user["credit"]:
            raise Refusal(status, "insufficient_credit", "Your account lacks credit; see the billing page.")
        self.user["credit"] -= amount

    def bill(self):
        """Brings the credit up to date, and stops what it does not pay for; called before every request."""
        now = self.now()
        for instance in self.rows("instances"):
            instance.pass_time(now)
            self.user["credit"] -= instance.bill(now)
            if self.user["credit"] + self.user["balance"] < 0 and instance.goal == "running":
                instance.halt("no credit")

    def store(self, text):
        """Puts a result where presigned URLs lead; like the real storage it takes a moment to appear there."""
        name = f"{digest('result', len(self.results))}.log"
        self.results[name] = (self.now() + min(0.4, self.boot / 2), text)
        return f"{self.url}/storage/{name}?X-Amz-Expires=300&X-Amz-Signature={digest(name)[:16]}%2B%3D"


def wrapped(rows, name):
    """The charges with those that name a workergroup, or an endpoint, together below one row for it."""
    plain, groups = [], {}
    for row in rows:
        if row["metadata"].get(name + "_id"):
            groups.setdefault(row["metadata"][name + "_id"], []).append(row)
        else:
            plain.append(row)
    return plain + [
        {"start": min(row["start"] for row in below), "end": max(row["end"] for row in below), "type": "serverless",
         "source": f"{name}-{group_id}", "description": f"{name} {group_id} charges", "items": below,
         "amount": round(sum(row["amount"] for row in below), 3),
         "metadata": {key: value for key, value in below[0]["metadata"].items() if key == "endpoint_id"}}
        for group_id, below in groups.items()]


def new_payment(nth, user, now):
    """One line of the payment history, the newest first; every sixth is a transfer."""
    service, cents = ("transfer", -500) if nth % 6 == 5 else (("stripe_payments", "coinbase")[nth % 3 == 2], 2500)
    when = now - nth * 2.5 * DAY - HOUR
    row = dict.fromkeys("payment_expected original_amount cut_amount cut_percent stripe_charge stripe_refund "
                        "stripe_payout error paypal_email transfer_group".split())
    return dict(row, id=2185400 - nth, user_id=user["id"], when=when, paid_on=when + 60, amount_cents=cents,
                is_credit=cents > 0, is_delayed=False, balance_before=0.0, balance_after=cents / 100, service=service,
                event_id=f"evt_{digest(nth)[:8]}", extra={}, failed=False, refunded=False, is_check=False)


def new_charge(instance, days_ago, now, **metadata):
    """What one instance cost on one day; the latest is not over yet."""
    row, start = instance.row, now - (days_ago + 1) * DAY + HOUR
    end = min(now, start + DAY)
    disk_hours = (end - start) / HOUR
    hours = disk_hours if instance.goal == "running" else 0.0
    common = {"start": start, "end": end}
    amounts = [("gpu", hours * row["dph_base"], f"{hours:.3f} hours at ${row['dph_base']:.3f}/hour"),
               ("disk", disk_hours * instance.disk_per_hour,
                f"{row['disk_space']:.0f} GB at ${row['storage_cost']}/month")]
    if hours:
        amounts += [("bwd", 12 * row["inet_down_cost"], f"12.000 GB at ${row['inet_down_cost']}/GB"),
                    ("bwu", 3 * row["inet_up_cost"], f"3.000 GB at ${row['inet_up_cost']}/GB")]
    items = [dict(common, type=kind, source=None, description=text, amount=round(amount, 3), metadata={}, items=[])
             for kind, amount, text in amounts]
    return dict(common, type="instance", source=f"instance-{instance.id}", items=items,
                metadata=dict(metadata, label=row["label"]), description=f"instance {instance.id} charges",
                amount=round(sum(item["amount"] for item in items), 3))


def cluster_nodes(subnet, machine_ids, taken=0):
    """Nodes with addresses in the subnet; the first of a new cluster is its manager."""
    prefix = subnet.rpartition(".")[0]
    return [{"machine_id": machine_id, "is_cluster_manager": taken + nth == 0,
             "local_ip": f"{prefix}.{taken + nth + 2}"} for nth, machine_id in enumerate(machine_ids)]


# -------------------------------------------------------------------- routes: searching and renting

ROUTES = {}  # "METHOD /path": handler(market, call, *ids from the path), which returns the answer or raises Answer


def route(method_and_path):
    """Registers a handler. {id} is a whole number, any other name in braces one segment of text; a final slash is
    optional everywhere."""
    def register(handler):
        ROUTES[method_and_path] = handler
        return handler
    return register


class SearchRoutes:
    """Offers, templates, market figures, and rentals."""

    def offers_for(self, body):
        """The priced offers that meet a search, in its order."""
        kind, storage = body.get("type", "on-demand"), number(body.get("allocated_storage", 5.0))
        if kind not in ("on-demand", "ondemand", "bid", "reserved"):
            raise Refusal(400, "invalid_args", f"Invalid offer type {kind!r}")
        rows = [priced(offer, kind, storage or 0.0) for offer in self.rows("offers")]
        return found(rows, body)

    @route("PUT /api/v0/search/asks/")
    def search_asks(self, call):
        return {"offers": columns(self.offers_for(call.body.get("q") or {}), call.body.get("select_cols"))}

    @route("GET /api/v0/template/")
    def search_templates(self, call):
        rows = arranged(matching(self.rows("templates"), call.query.get("select_filters")), call.query.get("order_by"))
        return {"success": True, "templates_found": len(rows),
                "templates": columns(rows, call.query.get("select_cols"))}

    @route("GET /api/v0/benchmarks/")
    def search_benchmarks(self, call):
        rows = arranged(matching(self.rows("benchmarks"), call.query.get("select_filters")), call.query.get("order_by"))
        page, following = page_of(rows, call.query, 25, 100)
        return {"success": True, "benchmarks_found": len(rows), "next_token": following,
                "benchmarks": columns(page, call.query.get("select_cols"))}

    def rent(self, offer_id, terms):
        """Makes an instance from an offer, or says why not."""
        by_hash = terms.get("template_hash_id")
        template = self.find_template(by_hash) if by_hash else None
        if not (terms.get("image") or template):
            raise Refusal(400, "invalid_args", "image or template_hash_id is required")
        offer = self.tables["offers"].get(offer_id)
        if not offer or offer["rented"] or not offer["rentable"]:
            raise Refusal(404, "no_such_ask", "error 404/3603: no_such_ask "
                          f"Instance type by id {offer_id} is not available.", ask_id=offer_id)
        bid, disk = terms.get("price"), number(terms.get("disk") or 10)
        if disk is None:
            raise Refusal(400, "invalid_args", f"Invalid disk size {terms['disk']!r}")
        if disk > offer["disk_space"]:
            raise Refusal(400, "invalid_args", f"Only {offer['disk_space']} GB of disk are left on this machine.")
        if priced(offer, storage=disk)["dph_total"] > self.user["balance"] + self.user["credit"]:
            raise Refusal(400, "insufficient_credit", "Your account lacks credit; see the billing page.")
        instance = self.new_instance(offer, terms, template)
        if bid is not None and (number(bid) or 0) < offer["min_bid"]:  # refused, and yet there: its disk is billed
            instance.halt("low bid")
            raise Refusal(400, "invalid_price", f"Your bid of {bid} is below the minimum of {offer['min_bid']}.",
                          new_contract=instance.id)
        return instance

    def new_instance(self, offer, terms, template=None):
        """The contract itself; it takes the offer off the market."""
        instance = Instance(next(self.ids), offer, terms, template, self.now())
        instance.behavior.update({**self.behaviours[None], **self.behaviours[offer["machine_id"]]})
        if terms.get("volume_info"):
            self.attach_volume(instance, terms["volume_info"])
        offer.update(rented=True, rentable=False)
        self.tables["instances"][instance.id] = instance
        return instance

    def attach_volume(self, instance, wish):
        if wish.get("create_new"):
            volume = self.new_volume("volume_offers", wish["volume_id"], wish.get("size") or 15, wish.get("name"))
        else:
            volume = self.find("volumes", wish["volume_id"])
        volume["instances"].append(instance.id)
        instance.row["volume_info"] = [{"id": volume["id"], "mount_path": wish.get("mount_path"),
                                        "avail_space": volume["disk_space"], "total_space": volume["disk_space"]}]

    @route("PUT /api/v0/asks/{id}/")
    def create_instance(self, call, offer_id):
        return {"success": True, "new_contract": self.rent(offer_id, call.body).id}

    @route("POST /api/v0/asks/bulk/")
    def create_instances(self, call):
        ids = call.need("ids")
        if len(ids) > 64:
            raise Refusal(400, "invalid_args", "too many asks")
        return {"success": True, "new_contracts": [self.rent(offer_id, call.body).id for offer_id in ids]}

    @route("PUT /api/v0/launch_instance/")
    def launch_instance(self, call):
        offers = self.offers_for(call.need("q"))
        if not offers:
            raise Refusal(404, "no_offers", "No offers matched your request")
        return {"success": True, "new_contract": self.rent(offers[0]["id"], call.body).id}

    @route("POST /api/v0/template/")
    def create_template(self, call):
        if not call.body.get("name"):
            raise Refusal(400, "invalid_args", "Template name is required")
        call.need("image")
        row = self.add("templates", new_template(call.body, next(self.ids), self.user["id"], self.now()))
        return {"success": True, "msg": f"Template Created Successfully! New Template ID: {row['id']}",
                "template": row}

    @route("PUT /api/v0/template/")
    @route("PUT /api/v1/template/")
    def update_template(self, call):
        old = self.find_template(call.need("hash_id"))
        row = self.add("templates", new_template(dict(old, **call.body), old["id"], old["creator_id"], self.now()))
        return {"success": True, "template": row}

    @route("DELETE /api/v0/template/")
    def delete_template(self, call):
        row = self.find_template(call.body.get("hash_id"), call.body.get("template_id"))
        self.remove("templates", row["id"])
        return {"success": True, "msg": "Template Deleted Successfully!"}

    @route("GET /api/v0/metrics/gpu/current/")
    def metrics_now(self, call):
        """Market figures by GPU model, from the offers that the query lets through."""
        wanted = {"verified": {"yes": True, "no": False}.get(call.query.get("verified")),
                  "datacenter": {"secure_cloud": True, "community": False}.get(call.query.get("hosting_type"))}
        conditions = {field: {"eq": value} for field, value in wanted.items() if value is not None}
        if isinstance(call.query.get("num_gpus"), int):
            conditions["num_gpus"] = {"eq": call.query["num_gpus"]}
        offers = matching(self.rows("offers"), conditions)
        return {"success": True, "gpus": [metrics_of(model, [row for row in offers if row["gpu_name"] == model.name])
                                          for model in MODELS]}

    @route("GET /api/v0/metrics/gpu/history/")
    def metrics_history(self, call):
        now = int(self.now())
        end, step = int(call.query.get("end") or now), int(call.query.get("step") or HOUR)
        start = int(call.query.get("start") or end - 2 * DAY)
        times = list(range(start, end + 1, max(step, (end - start) // 2000, 60)))
        names = [name.strip() for name in str(call.query.get("gpu_name", "RTX 4090")).split(",")]
        wanted = [model for model in MODELS if model.name in names]
        return {"success": True, "gpus": {model.name: history_of(model, times) for model in wanted}}

    @route("GET /api/v0/metrics/gpu/locations/")
    def metrics_locations(self, call):
        places = {place: rest for place, *rest in SITES}
        rows = []
        for offer in self.rows("offers"):
            city, latitude, longitude = places[offer["geolocation"]]
            rows.append({"latitude": latitude, "longitude": longitude, "city": city, "rented": offer["rented"],
                         "country_code": country_code(offer["geolocation"]), "gpu_name": offer["gpu_name"],
                         "state": "rented" if offer["rented"] else "available", "num_gpus": offer["num_gpus"],
                         "verified": offer["verification"] == "verified", "datacenter": offer["hosting_type"] == 1})
        return {"success": True, "locations": rows}


def found(rows, body):
    """Conditions, order and limit of a search applied to its rows."""
    rows = matching(rows, {field: tests for field, tests in body.items() if field not in NOT_CONDITIONS})
    limit = number(body.get("limit") or 64)
    if limit is None or limit < 1:
        raise Refusal(400, "invalid_args", f"Invalid limit {body['limit']!r}")
    return arranged(rows, body.get("order"))[:int(limit)]


def metrics_of(model, offers):
    verified = [row for row in offers if row["verification"] == "verified"]
    rented, rented_verified = (sum(row["num_gpus"] for row in rows if row["rented"]) for rows in (offers, verified))
    total, total_verified = (sum(row["num_gpus"] for row in rows) for rows in (offers, verified))
    prices = sorted(row["dph_base"] / row["num_gpus"] for row in offers)
    usage = round(100.0 * rented / total, 2) if total else None
    return {"gpu_name": model.name, "total": total, "available": total - rented, "unavailable": 0, "usage": usage,
            "usage_30d": usage, "rented_verified": rented_verified, "avail_verified": total_verified - rented_verified,
            "rented_unverified": rented - rented_verified, "dlperf": model.dlperf, "tflops": model.tflops,
            "avail_unverified": total - rented - total_verified + rented_verified,
            "tflops_per_dollar": round(model.tflops / model.price, 2), "price_p10": quantile(prices, 0.1),
            "price_p25": quantile(prices, 0.25), "price_median": quantile(prices, 0.5),
            "price_p75": quantile(prices, 0.75), "price_p90": quantile(prices, 0.9)}


def quantile(ascending, part):
    return round(ascending[int(part * (len(ascending) - 1))], 4) if ascending else None


def history_of(model, times):
    swing = [1 + (at // HOUR % 24 - 12) / 100 for at in times]
    supply = {"rented_verified": 400, "avail_verified": 120, "rented_unverified": 60, "avail_unverified": 30,
              "unavail_verified": 8, "unavail_unverified": 5, "total": 623}
    prices = {"rented_p10": 0.7, "rented_median": 1.0, "rented_p90": 1.5, "avail_p10": 0.8, "avail_median": 1.1,
              "avail_p90": 1.7}
    series = {name: [int(size * by) for by in swing] for name, size in supply.items()}
    pricing = {name: [round(model.price * size * by, 4) for by in swing] for name, size in prices.items()}
    return {"supply_demand": dict(series, timestamps=times), "pricing": dict(pricing, timestamps=times),
            "stats": {"tflops": model.tflops, "dlperf": model.dlperf,
                      "tflops_per_dollar": round(model.tflops / model.price, 1),
                      "dlperf_per_dollar": round(model.dlperf / model.price, 1)}}


# -------------------------------------------------------------------------------- routes: instances


class InstanceRoutes:
    """What is rented: its state, price, logs, keys, snapshots."""

    def views(self):
        now = self.now()
        return [instance.view(now, self.boot) for instance in self.rows("instances") if not instance.is_hidden(now)]

    @route("GET /api/v0/instances/{id}/")
    def show_instance(self, call, instance_id):
        instance = self.tables["instances"].get(instance_id)
        if instance and instance.is_hidden(self.now()):
            if instance.behavior["hidden_as"] == 404:
                raise Refusal(404, "no_such_instance", f"No such instance {instance_id}")
            instance = None
        return {"instances": instance and instance.view(self.now(), self.boot)}

    @route("GET /api/v1/instances/")
    def show_instances(self, call):
        rows = arranged(matching(self.views(), call.query.get("select_filters")), call.query.get("order_by"))
        page, following = page_of(rows, call.query, 25, 25)
        labels = collections.Counter(row["label"] or "" for row in rows)
        return {"success": True, "instances_found": len(page), "total_instances": len(rows), "label_counts": labels,
                "next_token": following, "instances": columns(page, call.query.get("select_cols"))}

    @route("GET /api/v0/instances/filters/")
    def instance_filters(self, call):
        names = ("actual_status", "verification", "gpu_name")
        seen = {tuple(row[name] for name in names) for row in self.views()}
        return {"success": True, "filters": [dict(zip(names, values)) for values in sorted(seen)]}

    @route("DELETE /api/v0/instances/{id}/")
    @route("DELETE /api/v0/instances/")
    def destroy_instances(self, call, *ids):
        """One or, with `instance_ids` in the body, many; each gives its offer back to the market."""
        for instance in [self.find("instances", instance_id) for instance_id in ids or call.need("instance_ids")]:
            instance.offer.update(rented=False, rentable=True)
            for volume in self.rows("volumes"):
                volume["instances"] = [holder for holder in volume["instances"] if holder != instance.id]
            self.remove("instances", instance.id)
        return {"success": True}

    @route("PUT /api/v0/instances/{id}/")
    @route("PUT /api/v0/instances/")
    @route("POST /api/v0/instances/start/")
    def change_instance(self, call, *ids):
        """State or label of one instance or, with ids in the body, of many."""
        ids = ids or call.body.get("IDs") or call.need("ids")
        instances = [self.find("instances", instance_id) for instance_id in ids]
        state, label = "running" if call.path.endswith("/start/") else call.body.get("state"), call.body.get("label")
        if state not in ("running", "stopped", None) or (state is None and label is None):
            raise Refusal(400, "invalid_args", "state must be running or stopped, or label must be given")
        for instance in instances:
            if state:
                instance.set_goal(state, self.now())
            if label is not None:
                instance.row["label"] = label
        return {"success": True}

    @route("PUT /api/v0/instances/reboot/{id}/")
    @route("PUT /api/v0/instances/recycle/{id}/")
    def restart(self, call, instance_id):
        instance = self.find("instances", instance_id)
        if instance.goal != "running":
            raise Refusal(400, "invalid_args", f"Instance {instance_id} is not running.")
        instance.started = self.now()
        if "recycle" in call.path:
            instance.files = dict(FILES)
        return {"success": True}

    @route("PUT /api/v0/instances/bid_price/{id}/")
    def change_bid(self, call, instance_id):
        instance, bid = self.find("instances", instance_id), call.body.get("price")
        if bid is not None and not (number(bid) or 0) >= 0.001:
            raise Refusal(400, "invalid_args", "Please set a bid price >= 0.001.")
        instance.row["is_bid"] = True
        instance.price(bid if bid is not None else instance.offer["min_bid"] * 1.05)
        if instance.halted in ("outbid", "low bid") and instance.row["dph_base"] >= instance.offer["min_bid"]:
            instance.halted = ""
            instance.set_goal("running", self.now())
        return {"success": True}

    @route("PUT /api/v0/instances/prepay/{id}/")
    def prepay(self, call, instance_id):
        instance, amount = self.find("instances", instance_id), number(call.need("amount"))
        self.spend(amount, status=411)
        instance.row["credit_balance"] = (instance.row["credit_balance"] or 0.0) + amount
        months = instance.row["credit_balance"] / (instance.row["dph_total"] * HOURS_PER_MONTH)
        return {"success": True, "timescale": round(months, 4), "discount_rate": min(0.4, round(0.1 * months, 4))}

    @route("GET /api/v0/instances/balance/{id}/")
    def show_deposit(self, call, instance_id):
        deposit = self.find("instances", instance_id).row["credit_balance"] or 0.0
        return {"success": True, "refundable_deposit": deposit, "total_discount": round(deposit * 0.1, 2),
                "discount_months": 3 if deposit else 0}

    @route("GET /api/v0/instances/pending-price-increases/")
    def show_price_increases(self, call):
        rows = self.rows("price_increases")
        return {"success": True, "count": len(rows), "truncated": False, "pending_price_increases": rows}

    @route("PUT /api/v0/instances/update_template/{id}/")
    def update_instance(self, call, instance_id):
        instance, body = self.find("instances", instance_id), call.body
        named = body.get("template_hash_id") or body.get("template_id")
        template = self.find_template(body.get("template_hash_id"), body.get("template_id")) if named else None
        instance.configure(body, template)
        return {"success": True, "updated_instance": {"id": instance.id, "image_uuid": instance.row["image_uuid"]}}

    @route("PUT /api/v0/instances/request_logs/{id}/")
    def request_logs(self, call, instance_id):
        instance = self.find("instances", instance_id)
        lines = instance.daemon_log() if call.body.get("daemon_logs") == "true" else instance.container_log(self.now())
        try:
            lines = [line for line in lines if re.search(call.body.get("filter") or "", line)]
        except re.error as error:
            raise Refusal(400, "invalid_args", f"Invalid filter: {error}") from None
        tail = number(call.body.get("tail"))
        lines = lines[-int(tail):] if tail else lines
        return {"success": True, "result_url": self.store("".join(line + "\n" for line in lines)),
                "msg": "Wait a few seconds and view the result_url"}

    @route("PUT /api/v0/instances/command/{id}/")
    def execute(self, call, instance_id):
        instance, command = self.find("instances", instance_id), call.need("command")
        return {"success": True, "writeable_path": instance.writeable_path,
                "result_url": self.store(instance.shell(command)),
                "msg": "Command is executing, wait a few seconds and then view the result_url"}

    @route("GET /storage/{name}")
    def fetch_result(self, call, name):
        """The presigned storage: knows no keys, and is offended by them, as S3 is."""
        if call.authorization:
            raise Answer(400, "<Error><Code>InvalidArgument</Code>"
                              "<Message>Only one auth mechanism allowed</Message></Error>")
        ready, text = self.results.get(name, (float("inf"), ""))
        if self.now() < ready:
            raise Answer(404, "<Error><Code>NoSuchKey</Code></Error>")
        return Text(text)

    @route("GET /api/v0/instances/{id}/ssh/")
    def show_instance_keys(self, call, instance_id):
        keys = self.find("instances", instance_id).keys
        return {"success": True, "ssh_keys": json.dumps(list(keys.values()))}

    @route("POST /api/v0/instances/{id}/ssh/")
    def attach_key(self, call, instance_id):
        instance, text = self.find("instances", instance_id), call.need("ssh_key")
        known = next((row["id"] for row in self.rows("ssh_keys") if row["key"] == text), None) or next(self.ids)
        instance.keys[known] = {"id": known, "public_key": text}
        return {"success": True, "msg": "SSH key added to instance."}

    @route("DELETE /api/v0/instances/{id}/ssh/{id}/")
    def detach_key(self, call, instance_id, key_id):
        if self.find("instances", instance_id).keys.pop(key_id, None) is None:
            raise Refusal(404, "no_such_ssh_key", f"SSH key {key_id} is not attached to instance {instance_id}")
        return {"success": True, "msg": "SSH key removed from instance."}

    @route("POST /api/v0/instances/take_snapshot/{id}/")
    def take_snapshot(self, call, instance_id):
        instance = self.find("instances", instance_id)
        call.need("personal_repo")
        self.add("backups", {"contract_id": instance.id, "type": "snapshot", "machine_id": instance.row["machine_id"],
                             "status": "pending", "created_at": self.now(), "info": None})
        return {"success": True, "msg": "snapshot scheduled"}

    @route("GET /api/v0/instance_backups/{id}/download/")
    def backup_files(self, call, contract_id):
        """The files of an instance's latest backup; the id is the instance's."""
        if contract_id not in [row["contract_id"] for row in self.rows("backups")]:
            raise Refusal(404, "not_found", f"No backup of instance {contract_id}")
        address = f"https://files.example.com/c.{contract_id}"
        return {"success": True, "authorization_token": "4_00/ab+c=", "expires_in_sec": HOUR, "truncated": False,
                "files": [{"name": f"upper{name}", "size": size, "url": address + name}
                          for name, size in FILES.items()]}

    @route("PUT /api/v0/instances/accept-price-increase/")
    @route("PUT /api/v0/instances/reject-price-increase/")
    def settle_price_increase(self, call):
        increase_id = call.need("pending_price_increase_id")
        if increase_id not in self.tables["price_increases"]:
            raise Refusal(404, "no_pending_price_increase", f"There is no pending price increase {increase_id}.")
        row = self.remove("price_increases", increase_id)
        instance = self.tables["instances"].get(row["contract_id"])
        if instance and "accept" in call.path:
            instance.offer["dph_base"] = row["new_gpu_costpersec"] * HOUR
            instance.price()
        return {"success": True, "pending_price_increase_id": increase_id, "contract_id": row["contract_id"]}

    @route("POST /api/v0/contracts/fetch/")
    def fetch_contracts(self, call):
        """Ids and labels of contracts, of all or of those asked for."""
        ids, label = call.body.get("contract_ids"), call.body.get("label")
        rows = [{"id": row.id, "label": row.row["label"]} for row in self.rows("instances") if not ids or row.id in ids]
        return {"success": True, "contracts": [row for row in rows if label in (None, row["label"])]}


# -------------------------------------------------- routes: copies, schedules, volumes, deployments


class StorageRoutes:
    """Copies, schedules, volumes and deployments."""

    @route("PUT /api/v0/commands/rsync/")
    @route("PUT /api/v0/commands/copy_direct/")
    def copy(self, call):
        """Between two remotes it just begins; from or to this computer the answer says where rsync shall connect."""
        call.need("src_path", "dst_path")
        sides, answer = {side: call.body.get(f"{side}_id") for side in ("src", "dst")}, {"success": True}
        for side, place in sides.items():
            contract = re.fullmatch(r"(?:C\.)?(\d+)", str(place))
            instance = contract and self.tables["instances"].get(int(contract.group(1)))
            if contract and not instance:
                raise Refusal(400, "invalid_args", f"Invalid {side}_id.")
            if instance:
                answer[f"{side}_addr"] = instance.offer["public_ipaddr"]
                answer[f"{side}_port"] = 22000 + instance.id % 1000
        if set(sides.values()) & {None, "local"}:
            return answer
        return {"success": True,
                "msg": "Remote to Remote copy initiated - check instance status bar for progress updates."}

    @route("POST /api/v0/commands/rclone/")
    def cloud_copy(self, call):
        selected = call.need("selected")
        if number(selected) not in self.tables["connections"]:
            raise Refusal(400, "invalid_args", f"Unknown cloud connection {selected}")
        self.find("instances", int(number(call.need("instance_id")) or 0))
        return {"success": True, "msg": "Cloud Copy Operation Started", "result_url": None}

    @route("POST /api/v0/commands/schedule_job/")
    def create_job(self, call):
        """At most one job for an instance and endpoint: a second one is answered with the id of the first."""
        instance_id, api_endpoint = call.need("instance_id", "api_endpoint")
        for job in self.rows("jobs"):
            if (job["instance_id"], job["api_endpoint"]) == (instance_id, api_endpoint):
                raise Refusal(422, "job_exists", "A scheduled job exists already", scheduled_job_id=job["id"])
        job = {"min_of_the_hour": 0, "day_of_the_week": None, "hour_of_the_day": None}
        job = self.add("jobs", dict(job, **call.body))
        return {"success": True, "scheduled_job_id": job["id"]}

    def new_volume(self, table, offer_id, size, name=None):
        """A volume made from an offer, or as a copy of another volume's."""
        offer, volume_id = self.find(table, offer_id), next(self.ids)
        return self.add("volumes", {
            "id": volume_id, "cluster_id": offer.get("cluster_id"), "label": name, "disk_space": float(size),
            "status": "active", "start_date": self.now(), "public_ipaddr": "203.0.113.45", "instances": [],
            "storage_cost": offer["storage_cost"],
            "storage_total_cost": offer["storage_cost"] * float(size) / HOURS_PER_MONTH,
            **{field: offer[field] for field in ("disk_name", "driver_version", "inet_up", "inet_down", "reliability2",
                                                 "machine_id", "verification", "host_id", "geolocation")}})

    @route("POST /api/v0/volumes/copy/")
    def clone_volume(self, call):
        source_id, offer_id = call.need("src_id", "dst_id")
        source = self.find("volumes", source_id)
        size = call.body.get("size") or source["disk_space"]
        volume = self.new_volume("volume_offers", offer_id, size, source["label"])
        return {"success": True, "volume_name": f"V.{volume['id']}"}

    @route("GET /api/v0/volumes/")
    def show_volumes(self, call):
        kind = call.query.get("type", "all_volume")
        return {"volumes": [row for row in self.rows("volumes")
                            if kind in ("all_volume", "network_volume" if row["cluster_id"] else "local_volume")]}

    @route("DELETE /api/v0/volumes/")
    def delete_volume(self, call):
        volume = self.tables["volumes"].get(call.query.get("id"))
        if volume is None:
            raise Refusal(404, "no_such_volume", "Volume with that ID does not exist.")
        if volume["instances"]:
            raise Refusal(400, "volume_in_use", f"Volume is attached to instance {volume['instances'][0]}")
        self.remove("volumes", volume["id"])
        return {"success": True}

    @route("POST /api/v0/volumes/")
    def list_volume(self, call):
        """A host offers space on one machine or on several for volumes."""
        machines, listed = call.need("machine"), None
        for machine_id in machines if isinstance(machines, list) else [machines]:
            self.find("machines", machine_id)
            offer = next(row for row in self.rows("offers") if row["machine_id"] == machine_id)
            listed = self.add("volume_offers", dict(volume_offer(offer, next(self.ids)),
                                                    disk_space=call.body.get("size") or 15,
                                                    storage_cost=call.body.get("price_disk") or 0.1))
        return {"success": True, "msg": f"volume on machine {machines} offered", "id": listed["id"]}

    @route("POST /api/v0/network_volumes/")
    def list_network_volume(self, call):
        self.find("network_disks", call.need("disk_id"))
        row = network_volume_offer(self.rows("offers")[0], next(self.ids), 12)
        row.update(disk_space=call.body.get("size") or 15, storage_cost=call.body.get("price_disk") or 0.15)
        self.add("network_offers", row)
        return {"success": True, "msg": f"Listed network volume offer {row['id']}", "id": row["id"]}

    @route("GET /api/v0/network_disk/")
    def show_network_disks(self, call):
        disks = self.rows("network_disks")
        machines = sorted({machine for disk in disks for machine in disk["machines"]})
        return {"success": True, "data": [{
            "cluster_id": 12, "machine_ids": machines,
            "mounts": {str(machine): disk["mount_point"] for disk in disks for machine in disk["machines"]},
            "network_disks": [{"network_disk_id": disk["id"], "free_space": 900.5, "total_space": 1000.0}
                              for disk in disks]}]}

    @route("POST /api/v0/network_disk/")
    def add_network_disk(self, call):
        machines, mount_point = call.need("machines", "mount_point")
        disk = {"machines": machines, "mount_point": mount_point}
        if call.body.get("disk_id"):
            disk["id"] = call.body["disk_id"]
        return {"success": True, "disk_id": self.add("network_disks", disk)["id"], "msg": "ok"}

    @route("GET /api/v0/deployment/{id}/versions/")
    def deployment_versions(self, call, deployment_id):
        row = self.find("deployments", deployment_id)
        versions = (("current_version_id", "updated_at", None), ("last_healthy_version_id", "created_at", True))
        return {"success": True, "versions": [
            {"id": row[name], "file_hash": digest(row[name])[:16], "created_at": row[at], "healthy": healthy}
            for name, at, healthy in versions]}

    @route("DELETE /api/v0/deployments/")
    def delete_deployments(self, call):
        name, tag = call.need("name"), call.body.get("tag")
        ids = [row["id"] for row in self.rows("deployments") if row["name"] == name and tag in (None, row["tag"])]
        if not ids:
            raise Refusal(404, "not_found", f"Deployment {name} not found")
        for deployment_id in ids:
            self.remove("deployments", deployment_id)
        return {"success": True, "count": len(ids)}


# ------------------------------------------------------------------------------------ routes: hosts


class HostRoutes:
    """Machines, clusters and overlays."""

    def machine_offers(self, machine_id):
        self.find("machines", machine_id)
        return [row for row in self.rows("offers") if row["machine_id"] == machine_id]

    @route("PUT /api/v0/machines/create_asks/")
    def list_machine(self, call):
        """Puts a machine on the market; what is not given stays as it was."""
        machine, chunk = call.need("machine", "min_chunk")
        if machine not in self.tables["machines"]:
            return {"success": False, "msg": "Only machine owner can create ask contracts"}
        row, price = self.find("machines", machine), call.body.get("price_gpu")
        for name, given in (("listed_gpu_cost", price), ("listed_inet_up_cost", call.body.get("price_inetu")),
                            ("listed_inet_down_cost", call.body.get("price_inetd")),
                            ("min_bid_price", call.body.get("price_min_bid")),
                            ("credit_discount_max", call.body.get("credit_discount_max"))):
            row[name] = row[name] if given is None else given
        row["listed"] = True
        for offer in self.machine_offers(machine):
            offer.update(rentable=not offer["rented"], dph_base=row["listed_gpu_cost"] * offer["num_gpus"])
        return {"success": True, "extended": 0, "msg": f"ask contracts created, min_chunk {chunk}"}

    @route("DELETE /api/v0/machines/{id}/asks/")
    def unlist_machine(self, call, machine_id):
        for offer in self.machine_offers(machine_id):
            offer["rentable"] = False
        self.find("machines", machine_id)["listed"] = False
        return {"success": True, "machine_id": machine_id, "user_id": self.user["id"]}

    @route("POST /api/v0/machines/{id}/force_delete/")
    def delete_machine(self, call, machine_id):
        if any(offer["rented"] for offer in self.machine_offers(machine_id)):
            return {"success": False, "msg": "machine has active client contracts"}
        self.unlist_machine(call, machine_id)
        self.remove("machines", machine_id)
        return {"success": True, "msg": f"machine {machine_id} deleted"}

    @route("PUT /api/v0/machines/{id}/minbid/")
    def set_min_bid(self, call, machine_id):
        self.find("machines", machine_id)["min_bid_price"] = call.body.get("price")
        return {"success": True, "you_sent": call.body}

    @route("PUT /api/v0/machines/create_bids/")
    def set_default_job(self, call):
        machine_id = call.need("machine")
        self.find("machines", machine_id)
        self.tables["default_jobs"][machine_id] = call.body
        return {"success": True, "machine_id": machine_id, "user_id": self.user["id"], "you_sent": call.body}

    @route("DELETE /api/v0/machines/{id}/defjob/")
    def remove_default_job(self, call, machine_id):
        self.find("machines", machine_id)
        if self.tables["default_jobs"].pop(machine_id, None) is None:
            return {"success": False, "msg": "no default job on this machine"}
        return {"success": True, "machine_id": machine_id, "user_id": self.user["id"]}

    @route("PUT /api/v0/machines/{id}/dnotify/")
    def schedule_maintenance(self, call, machine_id):
        self.find("machines", machine_id)
        start, hours = (number(value) for value in call.need("sdate", "duration"))
        self.add("maintenances", {"machine_id": machine_id, "start_time": start, "end_time": start + hours * HOUR,
                                  "duration_hours": hours,
                                  "maintenance_category": call.body.get("maintenance_category")})
        return {"success": True, "notified": 0, "you_sent": call.body}

    @route("PUT /api/v0/machines/{id}/cancel_maint/")
    def cancel_maintenance(self, call, machine_id):
        self.find("machines", machine_id)
        doomed = [row["id"] for row in self.rows("maintenances") if row["machine_id"] == machine_id]
        for maintenance_id in doomed:
            self.remove("maintenances", maintenance_id)
        return {"success": True, "machine_id": machine_id,
                "msg": f"deleted {len(doomed)} scheduled maintenance window(s) on machine {machine_id}"}

    @route("PUT /api/v0/machines/defrag_offers/")
    def defrag_machines(self, call):
        return {"success": True, "summary": dict.fromkeys(call.need("machine_ids"), {"moved": 0})}

    @route("GET /api/v0/machines/maintenances/")
    def show_maintenances(self, call):
        wanted = call.query.get("machine_ids")
        return [row for row in self.rows("maintenances") if not wanted or row["machine_id"] in wanted]

    @route("GET /api/v0/machines/{id}/reports/")
    def show_reports(self, call, machine_id):
        if machine_id not in {offer["machine_id"] for offer in self.rows("offers")}:
            raise Refusal(404, "not_found", "Machine not found.")
        return [{"problem": "slow disk", "message": "I/O stalls every minute",
                 "created_at": self.days_ago(5)}]

    @route("POST /api/v0/cluster/")
    def create_cluster(self, call):
        subnet, manager_id = call.need("subnet", "manager_id")
        row = self.add("clusters", {"subnet": subnet, "nodes": cluster_nodes(subnet, [manager_id])})
        return {"success": True, "msg": f"Cluster {row['id']} created"}

    @route("PUT /api/v0/cluster/")
    def join_cluster(self, call):
        cluster_id, machine_ids = call.need("cluster_id", "machine_ids")
        row = self.find("clusters", cluster_id)
        row["nodes"] += cluster_nodes(row["subnet"], machine_ids, len(row["nodes"]))
        return {"success": True, "msg": f"joined {len(machine_ids)} machines"}

    @route("DELETE /api/v0/cluster/remove_machine/")
    def leave_cluster(self, call):
        cluster_id, machine_id = call.need("cluster_id", "machine_id")
        row, manager_id = self.find("clusters", cluster_id), call.body.get("new_manager_id")
        if machine_id not in [node["machine_id"] for node in row["nodes"]]:
            raise Refusal(404, "not_found", f"Machine {machine_id} is not in cluster {cluster_id}")
        row["nodes"] = [node for node in row["nodes"] if node["machine_id"] != machine_id]
        for node in row["nodes"] if manager_id else ():
            node["is_cluster_manager"] = node["machine_id"] == manager_id
        return {"success": True, "msg": "removed"}

    @route("DELETE /api/v0/cluster/")
    def delete_cluster(self, call):
        self.remove("clusters", call.need("cluster_id"))
        return {"success": True, "msg": f"Cluster {call.body['cluster_id']} deleted"}

    def find_overlay(self, name=None, overlay_id=None):
        for row in self.rows("overlays"):
            if row["name"] == name or (name is None and row["overlay_id"] == overlay_id):
                return row
        raise Refusal(404, "not_found", f"Overlay {overlay_id if name is None else name} not found")

    @route("POST /api/v0/overlay/")
    def create_overlay(self, call):
        cluster_id, name = call.need("cluster_id", "name")
        self.find("clusters", cluster_id)
        row = self.add("overlays", {"overlay_id": None, "name": name, "internal_subnet": "172.21.0.0/16",
                                    "cluster_id": cluster_id, "instances": []})
        row["overlay_id"] = row["id"]
        return {"success": True, "msg": "Overlay created", "overlay_id": row["id"]}

    @route("PUT /api/v0/overlay/")
    def join_overlay(self, call):
        name, instance_id = call.need("name", "instance_id")
        self.find_overlay(name)["instances"].append(self.find("instances", instance_id).id)
        return {"success": True, "msg": "joined"}

    @route("DELETE /api/v0/overlay/")
    def delete_overlay(self, call):
        row = self.find_overlay(call.body.get("overlay_name"), call.body.get("overlay_id"))
        self.remove("overlays", row["id"])
        return {"success": True, "msg": f"Overlay {row['name']} deleted"}


# ------------------------------------------------------------------------------- routes: serverless


class ServerlessRoutes:
    """Endpoints, workergroups and workers."""

    @route("POST /api/v0/endptjobs/")
    def create_endpoint(self, call):
        row = {"min_load": 0, "min_cold_load": 0, "target_util": 0.9, "cold_mult": 2.5, "cold_workers": 5,
               "max_workers": 20, "endpoint_name": None, "max_queue_time": None, "target_queue_time": None,
               "inactivity_timeout": None, "endpoint_state": "active", "user_id": self.user["id"]}
        row.update((name, value) for name, value in call.body.items() if name in row)
        row.update(created_at=self.stamp(self.now()), api_key=digest("endpoint", next(self.ids)),
                   auto_delete_in_seconds=None, auto_delete_due_24h=False)
        return {"success": True, "result": self.add("endpoints", row)["id"]}

    @route("DELETE /api/v0/endptjobs/{id}/")
    def delete_endpoint(self, call, endpoint_id):
        self.remove("endpoints", endpoint_id)
        groups = [row for row in self.rows("workergroups") if row["endpoint_id"] == endpoint_id]
        deleted = [worker["id"] for group in groups for worker in self.workers_of(group)]
        for group in groups:
            self.remove("workergroups", group["id"])
        return {"success": True, "msg": "deleted", "deleted_workers": deleted, "failed_workers": []}

    def find_endpoint(self, endpoint_id=None, name=None):
        for row in self.rows("endpoints"):
            if endpoint_id == row["id"] or (name and name == row["endpoint_name"]):
                return row
        return None

    @route("POST /api/v0/autojobs/")
    def create_workergroup(self, call):
        body = call.body
        if not (body.get("template_hash") or body.get("template_id") or body.get("search_params")):
            raise Refusal(400, "invalid_args", "template_hash or search_params is required")
        endpoint = self.find_endpoint(body.get("endpoint_id"), body.get("endpoint_name"))
        if endpoint is None:
            raise Refusal(400, "invalid_args", "Endpointgroup not found for user")
        row = {"min_load": 0, "target_util": 0.9, "cold_mult": 2.5, "cold_workers": 2, "test_workers": 2,
               "template_hash": None, "template_id": None, "search_params": "", "search_query": {}, "launch_args": None,
               "gpu_ram": 24, "created_at": self.now()}
        row.update((name, value) for name, value in body.items() if name in row and value is not None)
        wanted = re.findall(r"(\w+)=(\S+)", row["search_params"])
        row.update(endpoint_id=endpoint["id"], endpoint_name=endpoint["endpoint_name"], user_id=self.user["id"],
                   search_query={field: {"eq": value.replace("_", " ")} for field, value in wanted},
                   api_key=endpoint["api_key"])
        group = self.add("workergroups", row)
        if endpoint["min_load"]:  # there is work from the first moment on, so its workers are rented at once
            self.rent_workers(group, endpoint["max_workers"])
        return {"success": True, "id": group["id"]}

    def rent_workers(self, group, count):
        """Workers that are instances, from the first offers that the group's search lets through."""
        offers = [offer for offer in matching(self.rows("offers"), group["search_query"]) if offer["rentable"]]
        terms = {"label": group["endpoint_name"], "image": "vastai/pytorch"}
        ids = [self.new_instance(offer, terms).id for offer in offers[:count]]
        group["instances"] = group.get("instances", []) + ids
        return ids

    @route("DELETE /api/v0/autojobs/{id}/")
    def delete_workergroup(self, call, group_id):
        workers = self.workers_of(self.find("workergroups", group_id))
        self.remove("workergroups", group_id)
        return {"success": True, "msg": "deleted", "deleted_workers": [row["id"] for row in workers],
                "failed_workers": []}

    def workers_of(self, group):
        """The rented workers of a group, else two cold ones; they boot like instances, then measure themselves."""
        now, instances = self.now(), self.tables["instances"]
        ready = {group["id"] * 10 + nth: now - group["created_at"] >= self.boot for nth in range(2)}
        if "instances" in group:
            ready = {worker_id: instances[worker_id].status(now, self.boot) == "running"
                     for worker_id in group["instances"] if worker_id in instances}
        return [{"id": worker_id, "status": "idle" if warm else "loading", "gpu_name": "RTX 4090",
                 "measured_perf": 152.3 + nth if warm else 0.0, "url": f"{self.url}/worker/{worker_id}",
                 "created_at": self.stamp(group["created_at"])} for nth, (worker_id, warm) in enumerate(ready.items())]

    @route("POST /update_workers/")
    def update_workers(self, call):
        workers = self.workers_of(self.find("workergroups", call.need("workergroup_id")))
        return {"success": True, **({"cancelled": True} if call.body.get("cancel_update") else
                                    {"workers_to_update": len(workers)})}

    @route("POST /route/")
    def route_request(self, call):
        """The address of the worker that shall do one piece of work."""
        name, cost = call.need("endpoint", "cost")
        endpoint = self.find_endpoint(name=name)
        groups = [row for row in self.rows("workergroups") if endpoint and row["endpoint_id"] == endpoint["id"]]
        ready = [worker for group in groups for worker in self.workers_of(group) if worker["status"] == "idle"]
        number = call.body.get("request_idx") or next(self.ids)
        answer = {"endpoint": name, "request_idx": number}
        if not ready:
            loading = sum(len(self.workers_of(group)) for group in groups)
            return dict(answer, status=f"total workers: {loading}, loading workers: {loading}")
        return dict(answer, url=ready[0]["url"], cost=cost, reqnum=1, signature=digest("signature", name))


PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg==")


def work(call):
    """What a worker answers to a job: (status, type, body), where the body is bytes or an iterator of events."""
    grant, payload = call.body.get("auth_data") or {}, call.body.get("payload") or {}
    lacking = {"cost", "endpoint", "reqnum", "request_idx", "signature", "url"} - grant.keys()
    if lacking:
        return 422, "application/json", json.dumps({"auth_data": sorted(lacking)}).encode()
    path = "/" + call.path.split("/", 3)[3]
    if path == "/slow":
        time.sleep(float(payload.get("seconds", 2)))
        return 200, "application/json", b'{"done": true}'
    if path == "/fail":
        return 500, "application/json", b'{"error": "out of GPU memory"}'
    if path == "/generate/image":
        return 200, "image/png", PIXEL
    if path not in ("/v1/completions", "/v1/chat/completions"):
        return 404, "text/plain", b"404: Not Found"
    prompt = payload.get("prompt") or (payload.get("messages") or [{}])[-1].get("content", "")
    words = f"You said: {prompt}".split()[:payload.get("max_tokens", 64)]
    chat = path == "/v1/chat/completions"
    if payload.get("stream"):
        texts = (word if nth == 0 else f" {word}" for nth, word in enumerate(words))
        events = ({"choices": [{"delta": {"content": text}} if chat else {"text": text}]} for text in texts)
        return 200, "text/event-stream", events
    text = " ".join(words)
    choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return 200, "application/json", json.dumps({"choices": [{**choice, "finish_reason": "stop"}]}).encode()


def unknown_group(kind, name):
    """The log services answer HTTP 200 and a JSON string when something is wrong."""
    return f"authenticate_{kind}_apikey: invalid api_key or {kind} {name} not found"


# ------------------------------------------------------------------------------ routes: the account

RIGHT_CODE = "123456"
BACKUP_CODES = [f"AAAA-BBBB-{nth:04d}" for nth in range(1, 9)]
NOTIFICATIONS = {"client:low_credit": "Low balance", "client:outbid": "Instance outbid",
                 "client:instance_offline": "Instance offline", "host:machine_offline": "Machine offline"}


class AccountRoutes:
    """Keys, team, 2FA, money and notifications."""

    @route("POST /api/v0/ssh/")
    def create_ssh_key(self, call):
        row = {"user_id": self.user["id"], "created_at": self.stamp(self.now()), "deleted_at": None}
        text = call.need("ssh_key").strip()
        return {"success": True, "key": self.add("ssh_keys", dict(row, key=text, public_key=text))}

    @route("PUT /api/v0/ssh/{id}/")
    def update_ssh_key(self, call, key_id):
        row = self.find("ssh_keys", key_id)
        row["key"] = row["public_key"] = call.need("ssh_key").strip()
        return {"success": True, "key": row}

    @route("POST /api/v0/auth/apikeys/")
    def create_api_key(self, call):
        permissions = call.body.get("permissions") or {}
        row = self.add("api_keys", {
            "user_id": self.user["id"], "name": call.need("name"), "team_id": None, "team_name": None,
            "rights": "read" if permissions else "all", "permissions": permissions})
        return {"id": row["id"], "key": digest("key", row["id"]) * 2, "permissions": row["permissions"]}

    @route("PUT /api/v0/commands/reset_apikey/")
    def reset_api_key(self, call):
        self.key = digest("new key", self.key) * 2
        return {"success": True, "new_api_key": self.key}

    @route("PUT /api/v0/users/")
    def set_user(self, call):
        self.user.update((name, value) for name, value in call.body.items() if name not in ("id", "balance", "credit"))
        return {"success": True}

    @route("POST /api/v0/users/")
    def create_subaccount(self, call):
        email, username, _ = call.need("email", "username", "password")
        if email in [row["email"] for row in self.rows("subaccounts")]:
            raise Refusal(409, "user_exists", "User already exists")
        row = self.add("subaccounts", {
            "email": email, "username": username, "credit": 0.0, "parent_id": self.user["id"],
            "host_only": bool(call.body.get("host_only")), "key_id": next(self.ids), "deleted_at": None,
            "created_at": self.stamp(self.now())})
        return {"id": row["id"], "username": username, "email": email, "key_id": row["key_id"]}

    @route("POST /api/v0/secrets/")
    def create_secret(self, call):
        key = call.need("key")
        if key in self.secrets:
            return {"success": False, "error": "existing_key", "msg": f"Key {key} already exists"}
        self.secrets[key] = call.body.get("value")
        return {"success": True, "msg": "Environment variable added"}

    @route("PUT /api/v0/secrets/")
    @route("DELETE /api/v0/secrets/")
    def change_secret(self, call):
        """PUT sets and DELETE removes a secret that must be there."""
        key = call.need("key")
        if key not in self.secrets:
            raise Refusal(404, "not_found", f"Key {key} does not exist")
        if call.method == "DELETE":
            del self.secrets[key]
            return {"success": True, "msg": "Environment variable deleted"}
        self.secrets[key] = call.body.get("value")
        return {"success": True, "msg": "Environment variable updated"}

    @route("POST /api/v0/team/")
    def create_team(self, call):
        name, amount = call.need("team_name"), number(call.body.get("transfer_credit")) or 0.0
        self.spend(amount)
        self.team = {"id": next(self.ids), "name": name}
        return {"success": True, "msg": "Team Successfully Created!", "team_id": self.team["id"]}

    @route("DELETE /api/v0/team/")
    def destroy_team(self, call):
        if self.team is None:
            raise Refusal(404, "not_found", "There is no team")
        self.team = None
        for table in ("members", "roles", "invites"):
            self.tables[table].clear()
        return {"success": True, "msg": "Team deleted", "pkey_id": None}

    @route("POST /api/v0/team/invite/")
    def invite_member(self, call):
        email, role = str(call.query.get("email") or ""), str(call.query.get("role") or "")
        if not (email and role):
            raise Refusal(400, "invalid_args", "email and role are required")
        if email in [row["email"] for row in self.rows("members")]:
            raise Answer(400, {"msg": "User is already a member of this team."})
        self.add("invites", {"email": email, "role": role})
        return {"success": True, "msg": f"New invitation sent to {email}"}

    @route("POST /api/v0/team/roles/")
    def create_role(self, call):
        name = call.need("name")
        self.add("roles", {"name": name, "identifier": re.sub(r"\W+", "_", name.lower()),
                           "permissions": call.body.get("permissions") or {}})
        return {"msg": "success"}

    @route("GET /api/v0/team/roles/{name}/")
    def find_role(self, call, name):
        """Roles are shown and removed by name, changed by id."""
        for row in self.rows("roles"):
            if name in (row["name"], str(row["id"])):
                return row
        raise Refusal(404, "invalid_args", "Role not found")

    @route("PUT /api/v0/team/roles/{name}/")
    def update_role(self, call, name):
        role = self.find_role(call, name)
        role.update((field, call.body[field]) for field in ("name", "permissions") if field in call.body)
        return {"success": True, "msg": "role updated"}

    @route("DELETE /api/v0/team/roles/{name}/")
    def remove_role(self, call, name):
        self.remove("roles", self.find_role(call, name)["id"])
        return {"success": True}

    @route("GET /api/v0/tfa/status/")
    def tfa_status(self, call):
        return {"tfa_enabled": bool(self.tables["tfa_methods"]), "methods": self.rows("tfa_methods"),
                "backup_codes_remaining": len(BACKUP_CODES)}

    @route("POST /api/v0/tfa/sms/")
    @route("POST /api/v0/tfa/sms/resend/")
    @route("POST /api/v0/tfa/email/")
    def tfa_send(self, call):
        return {"success": True, "secret": digest("secret", next(self.ids))[:16], "msg": f"Code sent: {RIGHT_CODE}"}

    @route("POST /api/v0/tfa/totp-setup/")
    def tfa_totp_setup(self, call):
        secret = "JBSWY3DPEHPK3PXP"
        account = urllib.parse.quote(self.user["email"])
        return {"success": True, "secret": secret,
                "provisioning_uri": f"otpauth://totp/Vast.ai:{account}?secret={secret}&issuer=Vast.ai"}

    @route("POST /api/v0/tfa/confirm-new/")
    def tfa_confirm(self, call):
        call.need("secret")
        if call.body.get("code") != RIGHT_CODE:
            raise Refusal(400, "2fa_verification_failed", "Invalid verification code")
        first = not self.tables["tfa_methods"]
        self.add("tfa_methods", {
            "user_id": self.user["id"], "is_primary": first, "method": call.body.get("tfa_method", "totp"),
            "label": call.body.get("label"), "phone_number": call.body.get("phone_number"), "created_at": self.now(),
            "last_used": None, "fail_count": 0, "locked_until": None})
        return {"success": True, **({"backup_codes": BACKUP_CODES} if first else {})}

    @route("DELETE /api/v0/tfa/")
    def tfa_delete(self, call):
        check_code(call)
        rows = self.rows("tfa_methods")
        if not rows:
            raise Refusal(404, "not_found", "2FA is not active")
        self.remove("tfa_methods", call.body.get("target_id") or rows[0]["id"])
        return {"success": True, "remaining_methods": len(self.tables["tfa_methods"])}

    @route("PUT /api/v0/tfa/update/")
    def tfa_update(self, call):
        row = self.find("tfa_methods", call.need("tfa_method_id"))
        row.update((name, call.body[name]) for name in ("label", "is_primary") if name in call.body)
        return {"success": True, "method": row}

    @route("POST /api/v0/tfa/authorize-new-method/")
    @route("PUT /api/v0/tfa/authorize-new-method/")
    def tfa_authorize(self, call):
        """POST begins, unless a backup code settles it at once; PUT ends with the code."""
        if call.method == "POST" and not call.body.get("backup_code"):
            return self.tfa_send(call)
        check_code(call)
        return {"success": True, "msg": "Authorization successful."}

    @route("PUT /api/v0/commands/transfer_credit/")
    def transfer_credit(self, call):
        recipient, amount = call.need("recipient", "amount")
        self.spend(number(amount))
        newest = dict(self.rows("payments")[0], id=next(self.ids), when=self.now(), paid_on=self.now(),
                      amount_cents=-round(number(amount) * 100), is_credit=False, service="transfer",
                      extra={"to": recipient})
        self.tables["payments"] = {newest["id"]: newest, **self.tables["payments"]}
        return {"success": True}

    @route("GET /api/v0/invoices/")
    def search_invoices(self, call):
        rows = arranged(matching(self.rows("payments"), call.query.get("select_filters")), call.query.get("order_by"))
        return columns(rows, call.query.get("select_cols"))

    def ledger(self, call, rows):
        """The paged answer that invoices and charges share."""
        for row in rows:
            row.update(when=row["start"], day=row["start"], service=row["metadata"].get("service"))
        rows = matching(rows, call.query.get("select_filters"))
        rows = arranged(rows, [["start", "desc" if call.query.get("latest_first") else "asc"]])
        page, following = page_of(rows, call.query, 20, 100)
        hidden = ("when", "day", "service")
        return {"success": True, "count": len(page), "total": len(rows), "next_token": following,
                "results": [{name: value for name, value in row.items() if name not in hidden} for row in page]}

    @route("GET /api/v1/invoices/")
    def show_invoices(self, call):
        return self.ledger(call, [
            {"start": row["when"], "end": row["paid_on"], "source": row["service"],
             "type": "transfer" if row["service"] == "transfer" else "credit",
             "description": "MASTERCARD ...4242" if row["service"] == "stripe_payments" else "",
             "amount": -row["amount_cents"] / 100, "metadata": {"invoice_id": row["id"], "service": row["service"]},
             "items": []} for row in self.rows("payments")])

    @route("GET /api/v0/charges/")
    def show_charges(self, call):
        """Contracts with their items; as a tree, those of serverless stand below their endpoint and workergroup."""
        period = (call.query.get("select_filters") or {}).get("day") or {}
        if not {"gte", "lte"} <= set(period):
            raise Refusal(400, "invalid_args", "Must provide both 'day' gte and lte filters for instance charges")
        rows = [{name: value for name, value in row.items() if name != "id"} for row in self.rows("charges")]
        if call.query.get("format") == "tree":
            for name in ("workergroup", "endpoint"):
                rows = wrapped(rows, name)
        return self.ledger(call, rows)

    @route("GET /api/v0/users/{user}/invoices/")
    def show_statement(self, call, user):
        """The first generation's invoices: charges and payments in one list, amounts as text."""
        since, until = number(call.query.get("sdate")) or 0.0, number(call.query.get("edate")) or float("inf")
        rows = [{"id": row["id"], "description": row["service"], "quantity": None, "rate": None, "type": "payment",
                 "amount": str(row["amount_cents"] / 100), "timestamp": row["when"]} for row in self.rows("payments")]
        if call.query.get("inc_charges") is not False:
            for row in self.rows("charges"):
                rows += [{"id": row["id"], "description": f"{item['type']} charge: {item['description']}", "rate": None,
                          "quantity": "24.000", "amount": str(item["amount"]), "timestamp": row["end"],
                          "type": "charge", "instance_id": int(row["source"].partition("-")[2])}
                         for item in row["items"]]
        due = sum(instance.row["dph_total"] for instance in self.rows("instances") if instance.goal == "running")
        rows = [row for row in rows if since <= row["timestamp"] <= until]
        return {"invoices": arranged(rows, [["timestamp", "asc"]]),
                "current": {"charges": round(due, 4), "service_fee": 0.0, "total": round(due, 4),
                            "credit": self.user["credit"]}}

    @route("GET /api/v0/users/{user}/machine-earnings/")
    def show_earnings(self, call, user):
        last = number(call.query.get("eday")) or self.now() / DAY
        first = number(call.query.get("sday")) or last + 1 - (number(call.query.get("last_days")) or 90)
        machines = [row for row in self.rows("machines") if call.query.get("machid") in (None, row["id"])]
        days = range(max(int(first), int(last) - 90), int(last) + 1)
        total = len(machines) * len(days)
        return {"summary": {"total_gpu": 10.5 * total, "total_stor": 0.25 * total, "total_bwu": 0.0, "total_bwd": 0.0},
                "username": self.user["username"], "email": self.user["email"], "fullname": self.user["fullname"],
                "current": {"balance": self.user["balance"], "service_fee": 0.0, "total": 0.0, "credit": 0.0},
                "per_machine": [dict(earnings(len(days)), machine_id=row["id"]) for row in machines],
                "per_day": [dict(earnings(len(machines)), day=day) for day in days]}

    @route("GET /api/v0/users/{user}/notification-prefs/")
    @route("PUT /api/v0/users/{user}/notification-prefs/")
    def notification_preferences(self, call, user):
        if call.method == "PUT":
            for context, settings in call.need("notification_preferences").items():
                self.preferences.setdefault(context, {}).update(settings)
        return {"success": True, "notification_preferences": self.preferences}

    @route("POST /api/v0/webhooks/")
    def create_webhook(self, call):
        address, event_types = call.need("webhook_url", "event_types")
        check_event_types(call)
        stamp = self.stamp(self.now())
        row = self.add("webhooks", {"user_id": self.user["id"], "name": call.body.get("name"), "webhook_url": address,
                                    "event_types": event_types, "created_at": stamp, "updated_at": stamp,
                                    "webhook_secret": digest("webhook", next(self.ids))})
        return webhook_answer(row, secret=True)

    @route("GET /api/v0/webhooks/")
    def show_webhooks(self, call):
        return {"success": True, "webhooks": [shown_webhook(row) for row in self.rows("webhooks")]}

    @route("PUT /api/v0/webhooks/{id}/")
    def update_webhook(self, call, webhook_id):
        check_event_types(call)
        row = self.find("webhooks", webhook_id)
        row.update((name, call.body[name]) for name in ("name", "webhook_url", "event_types") if name in call.body)
        row["updated_at"] = self.stamp(self.now())
        return webhook_answer(row)

    @route("POST /api/v0/webhooks/{id}/rotate-secret/")
    def rotate_webhook_secret(self, call, webhook_id):
        row = self.find("webhooks", webhook_id)
        row["webhook_secret"] = digest("webhook", next(self.ids))
        return webhook_answer(row, secret=True)


def check_code(call):
    """Any second factor is right if its code is 123456; each backup code is too."""
    if call.body.get("code") != RIGHT_CODE and call.body.get("backup_code") not in BACKUP_CODES:
        raise Refusal(401, "2fa_verification_failed", "Invalid 2FA code", fail_count=1)


def earnings(machine_days):
    return {"gpu_earn": 10.5 * machine_days, "sto_earn": 0.25 * machine_days, "bwu_earn": 0.0, "bwd_earn": 0.0}


def shown_webhook(row):
    """The secret is shown once, when it is made."""
    return {name: value for name, value in row.items() if name != "webhook_secret"}


def webhook_answer(row, secret=False):
    return {"success": True, "webhook": row if secret else shown_webhook(row),
            "enabled_notification_preferences": row["event_types"]}


def check_event_types(call):
    unknown = set(call.body.get("event_types") or ()) - set(NOTIFICATIONS)
    if unknown:
        raise Refusal(400, "invalid_args", f"Unknown event types: {', '.join(sorted(unknown))}")


# -------------------------------------------------------- routes that need no function of their own


def searching(table):
    return lambda market, call: {"offers": found(market.rows(table), call.body)}


def updating(table):
    """The members of the body that the row has are set; null leaves them."""
    def handler(market, call, row_id):
        row = market.find(table, row_id)
        row.update({name: value for name, value in call.body.items()
                    if name in row and name != "id" and value is not None})
        return {"success": True, "id": row_id}
    return handler


def volume_creation(table, prefix):
    def handler(market, call):
        volume = market.new_volume(table, call.need("id"), call.body.get("size") or 15, call.body.get("name"))
        return {"success": True, "volume_name": f"{prefix}.{volume['id']}"}
    return handler


def unlisting(table, noun):
    def handler(market, call):
        market.remove(table, call.need("id"))
        return {"success": True, "msg": f"Unlisted {noun} {call.body['id']}."}
    return handler


def state_setting(state):
    def handler(market, call, deployment_id):
        market.find("deployments", deployment_id)["endpoint_state"] = state
        return {"success": True, "endpoint_state": state}
    return handler


def log_reading(kind):
    def handler(market, call):
        name = call.body.get("id") or call.body.get("endpoint")
        table = {"endpoint": "endpoints", "workergroup": "workergroups"}[kind]
        if name not in market.tables[table] and not (kind == "endpoint" and market.find_endpoint(name=name)):
            return unknown_group(kind, name)
        lines = [f"{market.stamp(market.born)} - Worker {nth} started" for nth in range(1, 6)]
        text = "\n".join(lines[-int(call.body.get("tail") or 1000):]) + "\n"
        return {"info0": "boot\n", "info1": text, "trace": "trace: " + text, "debug": "debug: " + text, "logs": text}
    return handler


def worker_listing(kind):
    def handler(market, call):
        wanted = call.need("id")
        groups = [row for row in market.rows("workergroups")
                  if wanted == row["endpoint_id" if kind == "endpoint" else "id"]]
        if not groups and not (kind == "endpoint" and market.find_endpoint(wanted)):
            return unknown_group(kind, wanted)
        return {"workers": [worker for group in groups for worker in market.workers_of(group)]}
    return handler


def code_check(**answer):
    """Answers always the same, once the code is right."""
    def handler(market, call):
        check_code(call)
        return dict(answer, success=True)
    return handler


def listing(table, under=None, only=None, **more):
    """Shows all rows, or those the query asks for by the field `only`: as a bare list, or as a member of an object."""
    def handler(market, call, *ids):
        rows = [row for row in market.rows(table) if call.query.get(only) in (None, row.get(only))]
        return dict(more, **{under: rows}) if under else rows
    return handler


def showing(table, under=None):
    """Shows one row, as it is or as a member of an object."""
    def handler(market, call, row_id):
        row = market.find(table, row_id)
        return {"success": True, under: row} if under else row
    return handler


def removal(table, **answer):
    def handler(market, call, row_id):
        market.remove(table, row_id)
        return answer or {"success": True}
    return handler


def fixed_answer(table, **answer):
    """Answers always the same, if there is such a row."""
    def handler(market, call, row_id):
        market.find(table, row_id)
        return dict(answer, success=True)
    return handler


# fmt: off
ROUTES.update({
    "POST /api/v0/bundles/": lambda market, call: {"offers": market.offers_for(call.body)},
    "POST /api/v0/volumes/search/": searching("volume_offers"),
    "POST /api/v0/network_volumes/search/": searching("network_offers"),
    "GET /api/v0/instance_backups/": listing("backups", under="backups", success=True, only="contract_id"),
    "DELETE /api/v0/commands/copy_direct/": lambda market, call: {"success": bool(call.need("dst_id"))},
    "DELETE /api/v0/commands/rclone/": lambda market, call: {"success": bool(call.need("dst_id"))},
    "GET /api/v0/users/cloud_integrations/": listing("connections"),
    "GET /api/v0/commands/schedule_job/": listing("jobs"),
    "PUT /api/v0/commands/schedule_job/{id}/": updating("jobs"),
    "DELETE /api/v0/commands/schedule_job/{id}/": removal("jobs"),
    "PUT /api/v0/volumes/": volume_creation("volume_offers", "V"),
    "POST /api/v0/volumes/unlist/": unlisting("volume_offers", "Volume"),
    "PUT /api/v0/network_volumes/": volume_creation("network_offers", "N"),
    "POST /api/v0/network_volumes/unlist/": unlisting("network_offers", "network volume"),
    "GET /api/v0/machines/": listing("machines", under="machines"),
    "GET /api/v0/machines/{id}/": lambda market, call, machine_id: [market.find("machines", machine_id)],
    "PUT /api/v0/machines/{id}/cleanup/": fixed_answer("machines", num_deleted=0, msg="deleted 0 expired contracts"),
    "GET /api/v0/clusters/": lambda market, call: {"clusters": market.tables["clusters"]},
    "GET /api/v0/overlay/": listing("overlays"),
    "GET /api/v0/endptjobs/": listing("endpoints", under="results", success=True),
    "PUT /api/v0/endptjobs/{id}/": updating("endpoints"),
    "GET /api/v0/autojobs/": listing("workergroups", under="results", success=True),
    "PUT /api/v0/autojobs/{id}/": updating("workergroups"),
    "POST /get_endpoint_logs/": log_reading("endpoint"),
    "POST /get_autogroup_logs/": log_reading("workergroup"),
    "POST /get_endpoint_workers/": worker_listing("endpoint"),
    "POST /get_workergroup_workers/": worker_listing("workergroup"),
    "GET /api/v0/deployments/": listing("deployments", under="deployments", success=True),
    "GET /api/v0/deployment/{id}/": showing("deployments", under="deployment"),
    "POST /api/v0/deployment/{id}/start/": state_setting("active"),
    "POST /api/v0/deployment/{id}/stop/": state_setting("stopped"),
    "DELETE /api/v0/deployment/{id}/": removal("deployments"),
    "GET /api/v0/ssh/": listing("ssh_keys"),
    "DELETE /api/v0/ssh/{id}/": removal("ssh_keys"),
    "GET /api/v0/auth/apikeys/": listing("api_keys", under="apikeys"),
    "GET /api/v0/auth/apikeys/{id}/": showing("api_keys"),
    "DELETE /api/v0/auth/apikeys/{id}/": removal("api_keys"),
    "GET /api/v0/secrets/": lambda market, call: {"success": True, "secrets": market.secrets},
    "GET /api/v0/audit_logs/": listing("audit_logs"),
    "GET /api/v0/users/current/": lambda market, call: dict(market.user, api_key=market.key),
    "GET /api/v0/subaccounts/": listing("subaccounts", under="users"),
    "GET /api/v0/users/{user}/ipaddrs/": listing("addresses", under="results", success=True),
    "GET /api/v0/notification-types/": listing("notification_types", under="notification_types", success=True),
    "DELETE /api/v0/webhooks/{id}/": removal("webhooks"),
    "POST /api/v0/webhooks/{id}/test/": fixed_answer("webhooks", msg="Test webhook delivered"),
    "POST /api/v0/tfa/": code_check(session_key="sandbox-session-8d1f", backup_codes_remaining=8),
    "PUT /api/v0/tfa/regen-backup-codes/": code_check(backup_codes=BACKUP_CODES),
    "GET /api/v0/team/members/": listing("members"),
    "DELETE /api/v0/team/members/{id}/": removal("members", status="success", message="User removed from the team."),
    "GET /api/v0/team/roles-full/": listing("roles"),
})
# fmt: on
for method_and_path, handler in list(ROUTES.items()):  # the documented names of the same services
    for name, alias in (("/autojobs/", "/workergroups/"), ("/get_autogroup_logs/", "/get_workergroup_logs/")):
        ROUTES[method_and_path.replace(name, alias)] = handler
WITHOUT_KEY = ("/api/v0/bundles", "/api/v0/search/asks", "/api/v0/volumes/search", "/api/v0/network_volumes/search",
               "/storage/")


def pattern_of(method_and_path):
    method, path = method_and_path.split()
    parts = [r"(\d+)" if part == "{id}" else "([^/]+)" if part[0] == "{" else re.escape(part)
             for part in path.strip("/").split("/")]
    return re.compile(f"{method} /{'/'.join(parts)}/?")


PATTERNS = [(pattern_of(method_and_path), handler) for method_and_path, handler in ROUTES.items()]


def route_for(call):
    """The route and the ids from the path."""
    for pattern, handler in PATTERNS:
        match = pattern.fullmatch(f"{call.method} {call.path}")
        if match:
            return handler, [int(part) if part.isdigit() and r"\d" in pattern.pattern else urllib.parse.unquote(part)
                             for part in match.groups()]
    raise Refusal(404, "not_found", f"Unknown path: {call.method} {call.path}")


# ------------------------------------------------------------ the market: state and routes together


class Market(SearchRoutes, InstanceRoutes, StorageRoutes, HostRoutes, ServerlessRoutes, AccountRoutes, State):
    """The simulated service without its HTTP: state and routes, one request at a time."""


# -------------------------------------------------------------------------------------- HTTP server


class Sandbox:
    """A simulated Vast.ai on a loopback port; a context manager. See the top of this file for its use.

    `credit` dollars to begin with, `boot` seconds until an instance runs, `rate` requests a second to any one path
    before 429, `strict` to accept no key but `key`, `clock` in place of time.time (looked up each
    time, so that fast_clock() reaches it).
    """

    def __init__(self, port=0, key="sandbox-5f0c2a9be1d74386", credit=25.0, boot=1.0, rate=None, strict=False,
                 clock=lambda: time.time()):
        self.market = Market(key, credit, boot, clock)
        self.requests, self.failures, self.losses = [], [], []
        self.recent = collections.defaultdict(collections.deque)
        self.rate, self.strict, self.lock = rate, strict, threading.Lock()
        self.server = SandboxServer(("127.0.0.1", port), SandboxHandler)
        self.server.box = self
        self.url = self.market.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def key(self):
        return self.market.key

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.hang_up()

    def hang_up(self):
        """Closes every open connection, as a server does with those that were idle for long."""
        for connection in list(self.server.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def fail(self, pattern, status=503, body="", headers=None, times=1):
        """The next `times` requests whose 'METHOD /path' matches the regex get this answer and do nothing."""
        with self.lock:
            self.failures.append([re.compile(pattern), times, Answer(status, body, headers)])

    def lose(self, pattern, status=None, body="", times=1):
        """The next `times` requests that match take place, but their answer is lost: the connection ends, or this
        status comes instead."""
        with self.lock:
            self.losses.append([re.compile(pattern), times, Answer(status, body)])

    def machine(self, machine_id=None, **behavior):
        """What is rented on this machine, or on any, behaves like that: `starts=False`, `message="no space left on
        device"`, `status="offline"`, `hidden=3`, `outbid=5`, `differs={"disk_space": 8.0}`; see BEHAVIOR."""
        assert set(behavior) <= set(BEHAVIOR), behavior
        with self.lock:
            self.market.behaviours[machine_id].update(behavior)

    def instance(self, instance_id, **behavior):
        """The same for one instance that exists."""
        assert set(behavior) <= set(BEHAVIOR), behavior
        with self.lock:
            self.market.find("instances", instance_id).behavior.update(behavior)

    def outbid(self, instance_id):
        """Somebody bids more than this instance pays, so it is stopped."""
        self.instance(instance_id, outbid=0)

    def offer(self, **members):
        """One more offer, a good single RTX 4090 but for these members; returns the row."""
        with self.lock:
            model = next(row for row in self.market.rows("offers")
                         if (row["gpu_name"], row["num_gpus"]) == ("RTX 4090", 1))
            row = dict(model, rented=False, rentable=True, verification="verified", id=next(self.market.ids),
                       machine_id=next(self.market.ids), reliability=0.999, reliability2=0.999)
            row.update(ask_contract_id=row["id"], **members)
            return self.market.add("offers", row)

    def workers(self, endpoint_id, count=1):
        """Rents workers for an endpoint; returns their ids, which are those of instances."""
        with self.lock:
            group = next(row for row in self.market.rows("workergroups") if row["endpoint_id"] == endpoint_id)
            return self.market.rent_workers(group, count)

    def answer(self, call):
        """(status, body, headers) for one request; the status is None if the connection is to end instead."""
        with self.lock:
            answer = self.serve(call)
            lost = due(self.losses, call)
            return (lost.status, Text(lost.body), {}) if lost else answer

    def serve(self, call):
        """(status, body, headers) for one request, which has taken place by then."""
        self.requests.append(call.record())
        try:
            self.check(call)
            route, ids = route_for(call)
            self.authorize(call)
            self.market.bill()
            call.body = {} if call.body is None else call.body
            if not isinstance(call.body, dict):
                raise Refusal(400, "invalid_request", "Invalid json body")
            body = route(self.market, call, *ids)
            self.audit(call)
            return 200, body if isinstance(body, Text) else json.dumps(body), {}
        except Answer as answer:
            body = Text(answer.body) if isinstance(answer.body, str) else json.dumps(answer.body)
            return answer.status, body, answer.headers
        except Exception as error:  # a bug in a route: say so rather than hang up
            traceback.print_exc()
            return 500, json.dumps({"success": False, "error": "sandbox_bug", "msg": repr(error)}), {}

    def check(self, call):
        """Prepared failures and the rate limit come before everything else."""
        failure = due(self.failures, call)
        if failure:
            raise failure
        recent, now = self.recent[call.path], time.monotonic()
        while recent and now - recent[0] >= 1:
            recent.popleft()
        if self.rate and len(recent) >= self.rate:
            raise Answer(429, "API requests too frequent: endpoint threshold=1.0", {"Retry-After": "1"})
        recent.append(now)

    def authorize(self, call):
        scheme, _, key = call.authorization.partition(" ")
        if not (scheme == "Bearer" and key.strip()):
            if not call.path.startswith(WITHOUT_KEY):
                raise Refusal(401, "auth_error", "This action requires login.")
        elif key.startswith(("bad", "revoked")) or (self.strict and key != self.key):
            raise Refusal(401, "auth_error", "Invalid user key")

    def audit(self, call):
        if call.method != "GET":
            self.market.add("audit_logs", {
                "ip_address": "127.0.0.1", "api_key_id": self.market.user["key_id"], "args": json.dumps(call.body),
                "created_at": self.market.stamp(self.market.now()), "api_route": call.method + "__" + call.path})


def due(prepared, call):
    """The answer that has been prepared for this request, or None."""
    for entry in prepared:
        pattern, times, answer = entry
        if times and pattern.fullmatch(f"{call.method} {call.path}"):
            entry[1] -= 1
            return answer
    return None


class SandboxServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    connections = frozenset()

    def server_bind(self):
        """Without HTTPServer's look-up of the host's name, which takes seconds where DNS does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]
        self.connections = set()

    def handle_error(self, request, client_address):
        """A client that went away is no news; anything else is a bug in a route."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class SandboxHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # buffered: header and body leave in one piece

    def setup(self):
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self):
        self.server.connections.discard(self.connection)
        super().finish()

    def serve(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = Call(self.command, self.path, dict(self.headers), raw)
        if call.path.startswith("/worker/"):
            self.server.box.requests.append(call.record())
            self.work(*work(call))
            return
        status, body, headers = self.server.box.answer(call)
        if status is None:
            self.close_connection = True
            return
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, Text) else "application/json")
        if "gzip" in self.headers.get("Accept-Encoding", "") and len(data) > 1024:
            data = gzip.compress(data, 1)
            self.send_header("Content-Encoding", "gzip")
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def work(self, status, kind, body):
        """Sends a worker's answer; events go out one by one."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if isinstance(body, bytes):
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in itertools.chain(map(json.dumps, body), ["[DONE]"]):
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
            time.sleep(0.02)
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def log_message(self, *args):
        pass


# ==================================================================================================
# 2. WHAT THE TESTS SHARE
# ==================================================================================================

# ----------------------------------------------------------------- in this process and as a process

SSH_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAnotherAnotherAnotherAnotherAn ada@home"
FAKE_PROGRAM = """#!/bin/sh
printf '%s\\n' "${0##*/}" "$@" >>"$FAKE_LOG"
exit ${FAKE_STATUS:-0}
"""


@contextlib.contextmanager
def temporary_folder():
    """A folder for as long as the block runs. A process that was killed may leave others that still write into it: it
    is removed until nothing appears in it, and what cannot be removed fails nothing."""
    folder = tempfile.mkdtemp()
    try:
        yield folder
    finally:
        for _ in range(100):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break
            time.sleep(0.05)


def folder_for(test):
    """The path of a folder that is removed when the test has ended."""
    folder = temporary_folder()
    path = folder.__enter__()
    test.addCleanup(folder.__exit__, None, None, None)
    return path


@functools.lru_cache(maxsize=None)
def compiled():
    """The path of vastai.py compiled once: Python compiles a program each time that it runs it from its source."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    return py_compile.compile(os.path.join(HERE, "vastai.py"), os.path.join(folder, "vastai.pyc"), doraise=True)


def clean_environment(home, **more):
    """The environment of a user who has nothing but the folder `home`."""
    kept = {name: value for name, value in os.environ.items() if not (
        name.startswith(("VAST", "XDG_")) or name.lower().endswith("_proxy") or name in ("PAGER", "COLUMNS"))}
    return {**kept, "HOME": home, "USERPROFILE": home, "PYTHONIOENCODING": "utf-8", **more}


@contextlib.contextmanager
def fast_clock():
    """Nobody waits: time.sleep() returns at once, and the clocks of this process go on by what was to be slept."""
    passed, sleep, clock, monotonic = [0.0], time.sleep, time.time, time.monotonic

    def jump(seconds):
        passed[0] += max(0.0, seconds)
        sleep(0.0001)

    with mock.patch("time.sleep", jump), mock.patch("time.time", lambda: clock() + passed[0]), \
            mock.patch("time.monotonic", lambda: monotonic() + passed[0]):
        yield


# Everywhere below: `run_here` runs a command line in this process, `run_process` as a process of its own to its end,
# `start_process` starts one and does not wait. What the first two return:
Ended = collections.namedtuple("Ended", "returncode stdout stderr")


class CommandCase(unittest.TestCase):
    """A sandbox and an empty home."""

    maxDiff = None
    box_options = {"boot": 0.3}

    def setUp(self):
        self.home = folder_for(self)
        self.box = Sandbox(**self.box_options)
        self.addCleanup(self.box.close)
        self.environment = clean_environment(self.home, VAST_URL=self.box.url, VAST_API_KEY=self.box.key)
        patched = mock.patch.dict(os.environ, self.environment, clear=True)
        patched.start()
        self.addCleanup(patched.stop)
        self.client = vastai.VastAI()
        self.addCleanup(self.client.close)

    def run_here(self, line, stdin="", **environment):
        """Runs a line for the shell, or a list of words, in this process."""
        words = shlex.split(line) if isinstance(line, str) else [str(word) for word in line]
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ, environment), mock.patch("sys.stdin", io.StringIO(stdin)), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = vastai.main(words)
        return Ended(status, out.getvalue(), err.getvalue())

    def ok(self, line, **options):
        """The stdout of a line that must succeed."""
        status, out, err = self.run_here(line, **options)
        self.assertEqual(status, 0, f"vastai {line}: {err}")
        return out

    def raw(self, line, **options):
        return json.loads(self.ok(line + " --raw", **options))

    def run_process(self, line, program="", **options):
        """The same in a process of its own."""
        words = shlex.split(line) if isinstance(line, str) else [str(word) for word in line]
        options = {"env": self.environment, "input": "", **options}
        program = os.path.join(HERE, program) if program else compiled()
        done = subprocess.run([sys.executable, program, *words], capture_output=True,
                              encoding="utf-8", timeout=30, **options)
        return Ended(done.returncode, done.stdout, done.stderr)

    def fake_programs(self, *names):
        """Programs in PATH that only write down how they were called; returns what reads that: words, one a line."""
        folder, log = os.path.join(self.home, "bin"), os.path.join(self.home, "called")
        os.makedirs(folder, exist_ok=True)
        for name in names:
            with open(os.path.join(folder, name), "w") as file:
                file.write(FAKE_PROGRAM)
            os.chmod(file.name, 0o755)
        os.environ.update(PATH=folder + os.pathsep + os.environ["PATH"], FAKE_LOG=log)

        def called():
            with open(log) as file:
                words = file.read().splitlines()
            os.unlink(log)
            return words
        return called

    def last(self, path):
        """The newest request to a path."""
        return next(request for request in reversed(self.box.requests) if re.fullmatch(path, request["path"]))

    def cheapest(self, query="num_gpus=1", **options):
        return self.client.search_offers(query=query, order="dph_total", **options)[0]["id"]

    def rented(self, **options):
        return self.client.create_instance(id=self.cheapest(), image="vastai/pytorch", **options)["new_contract"]

    def assertReadable(self, text, what=""):
        """Made for people: no ANSI codes, no control characters, nothing of Python in it."""
        self.assertNotRegex(text, r"[\x00-\x09\x0b-\x1f\x7f]", what)
        for sign in ("Traceback", "{'", "': ", "<class", "object at 0x"):
            self.assertNotIn(sign, text, what)


# ------------------------------------------------------------ a server that does what a script says

KEY = "key-8f3a52c1d97e4b60"
# For 127.0.0.1, signed by itself, until 2125; of no use to anybody else.
CERTIFICATE = """\
MIIBbDCCARKgAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwIBcNMjAwMTAxMDAwMDAwWhgPMjEyNTAxMDEwMDAwMDBa
MBQxEjAQBgNVBAMMCTEyNy4wLjAuMTBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABOs9cspE+WQ1CfCWHS2BR1Gt7DPQrd8cRb9vpkvVOGK8ML+6
M29CEL5pPaT5LocjECqVd4oLu3x5roKeQFtdfzujUzBRMA8GA1UdEQQIMAaHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQw
HQYDVR0OBBYEFFAgs0WPTQcV8d5pFfZdgL9dAdqEMAoGCCqGSM49BAMCA0gAMEUCIQDd1YiHzHdYF3tGH85X3tueaV+duadF4woc8Oljq++iiQIg
c4LOM9moo14bUpQl1EE5bzK9fq6hG5LAkWQPIze7sBE="""
PRIVATE = """\
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgXIJZGjpHUqZSPC60bH/QEA2pUduyyKhu4/pQEumQRR2hRANCAATrPXLKRPlkNQnw
lh0tgUdRrewz0K3fHEW/b6ZL1ThivDC/ujNvQhC+aT2k+S6HIxAqlXeKC7t8ea6CnkBbXX87"""


def pem(kind, text):
    return f"-----BEGIN {kind}-----\n" + "\n".join(re.findall(".{1,64}",
                                                              text.replace("\n", ""))) + f"\n-----END {kind}-----\n"


def reply(body=None, status=200, **headers):
    """The bytes of an answer; `body` is bytes, text or what becomes JSON, `retry_after="1"` a header."""
    data = body if isinstance(body, bytes) else body.encode() if isinstance(body, str) else json.dumps(body
                                                                                                       or {}).encode()
    headers = {"Content-Length": len(data), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"HTTP/1.1 {status} Some Words\r\n{head}\r\n".encode("latin-1") + data


def hang_up(faulty, sock, request):
    """Reads the request and closes."""


def reset(faulty, sock, request):
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stall(faulty, sock, request):
    faulty.over.wait(5)


def cut(data):
    """Sends this and closes."""
    return lambda faulty, sock, request: sock.sendall(data)


def stuck(data):
    """Sends this and no more."""
    def step(faulty, sock, request):
        sock.sendall(data)
        faulty.over.wait(5)
    return step


def trickle(data, pause=0.02):
    def step(faulty, sock, request):
        for at in range(len(data)):
            if faulty.over.wait(pause):
                break
            sock.sendall(data[at:at + 1])
    return step


AT_ONCE = object()  # closes a new connection before it reads anything


class Faulty:
    """Does to each request what the next step of a script says; the last step goes on forever.

    A step is the bytes of an answer, or a function of (server, socket, request) that returns True if the connection
    stays. `route` in place of a script gives the step for a request.
    """

    def __init__(self, *steps, tls=None, route=None):
        self.steps, self.route, self.tls = list(steps), route, tls
        self.requests, self.connections, self.sockets = [], 0, set()
        self.lock, self.over = threading.Lock(), threading.Event()
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(256)
        self.port = self.listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.over.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.hang_up()

    def hang_up(self):
        for sock in list(self.sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listener.accept()
                self.connections += 1
                threading.Thread(target=self.talk, args=(sock,), daemon=True).start()

    def talk(self, sock):
        self.sockets.add(sock)
        with contextlib.suppress(OSError, ValueError), sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.tls:
                sock = self.tls.wrap_socket(sock, server_side=True)
            if self.steps and self.steps[0] is AT_ONCE:
                self.next()
                return
            with sock, sock.makefile("rb") as file:
                while self.one(sock, file):
                    pass

    def one(self, sock, file):
        """Serves one request of a connection; True if there may be another."""
        request = self.read(file)
        if request is None:
            return False
        step = self.route(request) if self.route else self.next()
        if not isinstance(step, bytes):
            return step(self, sock, request)
        sock.sendall(step)
        return True

    def next(self):
        with self.lock:
            return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]

    def read(self, file):
        line = file.readline().decode("latin-1").split()
        if len(line) != 3:
            return None
        headers = {}
        for header in iter(file.readline, b"\r\n"):
            name, _, value = header.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        body = file.read(int(headers.get("content-length", 0)))
        request = {"method": line[0], "target": line[1], "path": line[1].partition("?")[0], "headers": headers,
                   "body": body}
        self.requests.append(request)
        return request

    @property
    def writes(self):
        return [(request["method"], request["target"], request["body"]) for request in self.requests
                if request["method"] != "GET"]


class FaultCase(unittest.TestCase):
    """A test with a home of its own, no proxies, and no waiting between attempts."""

    maxDiff = None

    def setUp(self):
        self.home = folder_for(self)
        kept = {name: value for name, value in os.environ.items()
                if not name.upper().startswith(("VAST", "XDG", "HTTP", "ALL_PROXY", "NO_PROXY", "SSL_", "REQUESTS_",
                                                "PYTHON"))}
        kept.update(HOME=self.home, USERPROFILE=self.home, NO_COLOR="1", COLUMNS="100")
        for patch in (mock.patch.dict(os.environ, kept, clear=True),
                      mock.patch("random.uniform", lambda low, high: 0.0)):
            patch.start()
            self.addCleanup(patch.stop)

    def serve(self, *steps, **options):
        server = Faulty(*steps, **options)
        self.addCleanup(server.__exit__)
        return server

    def client(self, server, **options):
        client = vastai.VastAI(KEY, server if isinstance(server, str) else server.url, **{"timeout": 5, **options})
        self.addCleanup(client.close)
        return client

    def error(self, call, *args, **given):
        """The VastAIError of a call; any other outcome fails the test."""
        try:
            answer = call(*args, **given)
        except vastai.VastAIError as error:
            told = "".join(traceback.format_exception(type(error), error, error.__traceback__)) + repr(error)
            self.assertNotIn(KEY, told)
            return error
        return self.fail(f"no error, but {answer!r}")

    def run_here(self, server, *words, stdin=""):
        """Runs a command line in this process, at this server."""
        out, err = io.StringIO(), io.StringIO()
        url = ["--url", server if isinstance(server, str) else server.url] if server else []
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("sys.stdin",
                                                                                          io.StringIO(stdin)):
            at = 0 if words[:1] == ("ssh",) else 2  # what stands behind an id is for ssh
            status = vastai.main([*words[:at], *url, "--api-key", KEY, *words[at:]])
        self.assertNotIn(KEY, out.getvalue() + err.getvalue())
        self.assertNotIn("Traceback", err.getvalue())
        return Ended(status, out.getvalue(), err.getvalue())

    def start_process(self, *words, before="", **options):
        """A command line in a process of its own; `before` is a shell's redirections or an ulimit."""
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        return subprocess.Popen([sys.executable, compiled(), *words], cwd=self.home, **options)

    def run_process(self, *words, env=(), **options):
        environment = {**os.environ, "VAST_API_KEY": KEY, **dict(env)}
        process = self.start_process(*words, env={k: v for k, v in environment.items() if v is not None}, **options)
        out, err = process.communicate(timeout=60)
        for stream in (out or b"", err or b""):
            self.assertNotIn(KEY.encode(), stream)
            self.assertNotIn(b"Traceback", stream)
        return Ended(process.returncode, *((text or b"").decode("utf-8", "replace") for text in (out, err)))


def server_context(folder):
    """A server's TLS context; its authority is left in the folder as ca.pem."""
    for name, kind, text in (("ca.pem", "CERTIFICATE", CERTIFICATE), ("key.pem", "PRIVATE " + "KEY", PRIVATE)):
        with open(os.path.join(folder, name), "w", encoding="ascii") as file:
            file.write(pem(kind, text))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(os.path.join(folder, "ca.pem"), os.path.join(folder, "key.pem"))
    return context


# --------------------------------------------------------------- believable arguments for every row

BELIEVABLE = {  # parameters whose kind does not say all that the command wants
    "ssh_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ test", "frequency": "DAILY", "src": "7:/a", "dst": "8:/b",
              "sdate": "01/31/2031", "email": "ada@example.com", "recipient": "ada@example.com",
    "duration": 2.0, "start_date": "2026-01-01", "end_date": "2026-02-01", "role": "client",
              "url": "https://example.com/hook",
    "events": ["instance.created"], "name": "a-name", "pubkey": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ test",
}
BESIDES = {  # parameters that a command does not require, but for another one
    "launch instance": {"gpu_name": "RTX_4090", "num_gpus": "1", "image": "i"},
    "create instance": {"image": "a/b"}, "create instances": {"image": "a/b"}, "take snapshot": {"repo": "a/b"},
    "delete template": {"template_id": 7}, "cloud copy": {"instance": 7, "connection": 8},
           "delete deployment": {"id": 7}, "get endpt-logs": {"id": 7},
    "tfa login": {"code": "123456"}, "tfa update": {"label": "phone"}, "tfa delete": {"code": "123456"},
    "tfa regen-codes": {"code": "123456"}, "create ssh-key": {"ssh_key": "ssh-ed25519 AAAA"},
    "update instance": {"image": "a/b"}, "update template": {"name": "x"}, "update endpoint": {"max_workers": 3},
    "update workergroup": {"gpu_ram": 8}, "update webhook": {"name": "x"}, "update team-role": {"name": "x"},
    "set min-bid": {"price": 1}, "set defjob": {"image": "a/b"},
}


def believable(row, face, folder):
    """Arguments with which a command can be called, the required ones alone."""
    path = os.path.join(folder, "object.json")
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"api": {}}')
    given = dict(BESIDES.get(row.name, {}))
    for arg in row.args:
        if arg.face in ("", face) and arg.name not in given and (arg.default if face == "sdk"
                                                                 else arg.cli) is vastai.REQUIRED:
            for value in [*filter(None, [BELIEVABLE.get(arg.name)]), *arg.choices[:1], [7], 7, "7", "text", True,
                          {"a": 1}, path]:
                with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, vastai.VastAIError):
                    vastai.convert_value(arg, value, face == "cli")
                    given[arg.name] = value
                    break
            else:
                raise AssertionError(f"no value for {row.name} {arg.name}")
    return given


def line_of(row, given):
    """The same arguments as words of a command line."""
    words = row.name.split()
    for arg in sorted(row.args, key=lambda arg: not arg.option):
        if arg.name in given:
            value = given[arg.name]
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            text = json.dumps(value) if isinstance(value, dict) else text
            words += [f"{arg.flags[-1]}={text}"] if arg.option else [text]
    return words


# ----------------------------------------------------------------------------- terminals and shells


class Terminal:
    """A program on a terminal of its own, to be typed at."""

    # A process of its own, as forking one that has threads may hang; a background test has SIGINT ignored.
    START = ("import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL);"
             "tty = os.open(sys.argv[1], os.O_RDWR); [os.dup2(tty, number) for number in range(3)];"
             "os.execvp(sys.argv[2], sys.argv[2:])")

    def __init__(self, words, env):
        import pty
        self.descriptor, inner = pty.openpty()
        self.process = subprocess.Popen([sys.executable, "-I", "-S", "-c", self.START, os.ttyname(inner), *words],
                                        env=env, start_new_session=True)
        self.inner, self.text = inner, ""

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        self.process.wait()
        os.close(self.descriptor)
        os.close(self.inner)

    def expect(self, wanted, seconds=60):
        """Reads on until `wanted` has appeared; returns all up to there."""
        import select
        end = time.monotonic() + seconds
        while wanted not in self.text:
            if not select.select([self.descriptor], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"no {wanted!r} in {self.text!r}")
            self.text += os.read(self.descriptor, 65536).decode("utf-8", "replace")
        before, _, self.text = self.text.partition(wanted)
        return before

    def type(self, text):
        os.write(self.descriptor, text.encode())

    def status(self):
        """The exit status, once it has ended by itself."""
        return self.process.wait(60)


class ShellCase(unittest.TestCase):
    """A home of its own, a `vastai` on the path, a sandbox and a service that never answers."""

    def setUp(self):
        self.box = Sandbox(boot=0)
        self.addCleanup(self.box.close)
        self.home = folder_for(self)
        self.cache = os.path.join(self.home, "cache", "vastai")
        program = os.path.join(self.home, "vastai")
        with open(program, "w") as file:
            file.write(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(compiled())} "$@"\n')
        os.chmod(program, 0o755)
        self.env = {"PATH": self.home + os.pathsep + os.environ["PATH"], "HOME": self.home, "TERM": "dumb",
                    "XDG_CACHE_HOME": os.path.join(self.home, "cache"), "LC_ALL": "C.UTF-8", "INPUTRC": os.devnull,
                    "XDG_CONFIG_HOME": os.path.join(self.home, "config"), "ZDOTDIR": self.home,
                    "VAST_URL": self.box.url, "VAST_API_KEY": self.box.key,
                    **{name: value for name, value in os.environ.items() if name == "PYTHONPYCACHEPREFIX"}}

    def silent_service(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        return "http://127.0.0.1:%d" % listener.getsockname()[1]

    def run_process(self, *words, text="", **env):
        done = subprocess.run([os.path.join(self.home, "vastai"), *words], env={**self.env, **env}, input=text,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=30)
        return Ended(done.returncode, done.stdout, done.stderr)

    def offered(self, *words, **env):
        """{candidate: meaning} as a shell gets it."""
        answer = self.run_process("__complete", *words, **env)
        self.assertEqual("", answer.stderr)
        return dict(line.partition("\t")[::2] for line in answer.stdout.splitlines())

    def rented(self):
        """The ids of the sandbox's two instances."""
        with vastai.VastAI(api_key=self.box.key, server_url=self.box.url) as client:
            ids = sorted(row["id"] for row in client.show_instances())
            client.label_instance(ids[0], "a:b\tc")
        return list(map(str, ids))

    def asked(self):
        return sum(call["path"] == "/api/v1/instances/" for call in self.box.requests)


# ==================================================================================================
# 3. TESTS
# ==================================================================================================

# ---------------------------------------------------------------------------------------- the table


FACES = ("", "cli", "sdk")


def faults_of(row):
    """What is wrong with a row of the table, and what should be there."""
    look = "look=, here or in register(): the command that shows whether what goes out ONCE was carried out"
    path = {arg.name for arg in row.args if "path" in row.places(arg)}
    spoken = row.columns or row.says or (not row.is_list and (row.returns or row.done or row.text or row.show))
    for wrong, fault in (
            (type(row.safe) is not bool, f"SAFE or ONCE as the third, not {row.safe!r}"),
            (row.effect not in (vastai.READS, vastai.SETS, vastai.SPENDS, vastai.DELETES),
             f"READS, SETS, SPENDS or DELETES as the fourth, not {row.effect!r}"),
            (row.path and row.method not in ("GET", "POST", "PUT", "DELETE"), f"no method {row.method!r}"),
            (row.method == "GET" and not row.safe, "a GET is SAFE to repeat"),
            (not isinstance(row.summary, str) or row.summary[-1:] in ("", "."), f"a summary without a full stop as the fifth, not {row.summary!r}"),
            (row.look and row.look not in vastai.NAMES, f"look={row.look!r} is no command"),
            (not (row.safe or row.look or row.face == "cli"), look),
            (row.face not in FACES, f"face={row.face!r}"),
            (row.ask_when not in ("always", "terminal", "within"), f"ask_when={row.ask_when!r}"),
            (row.ask_when != "always" and not row.ask, f"ask_when={row.ask_when!r} without ask="),
            (row.path and braces(row.path) != path,
             f"the braces of {row.path} are the names of arguments; these go into the path: {', '.join(path) or 'none'}"),
            (not (spoken or row.face == "sdk"), "columns=, done= or says=: what the command line shows of the result")):
        if wrong:
            yield fault
    for column in ("one_of", "either", "needs"):
        yield from strangers(row, column, getattr(row, column).replace(",", "").split())
    yield from strangers(row, "ask", braces(row.ask if row.ask_when != "within" else ""))
    for column in filter(lambda column: getattr(row, column), vastai.Command.FUNCTIONS.split()):
        takes = re.search(rf"^{column} +function (\(.*?\))", inspect.getdoc(vastai.Command), re.MULTILINE).group(1)
        try:
            inspect.signature(getattr(row, column)).bind(*takes.split(","))
        except TypeError:
            yield f"{column}= is a function {takes}, not {getattr(row, column)!r}"
    yield from column_faults(row.columns)
    yield from argument_faults(row)
    for line in row.examples.split("\n") if row.examples else ():
        words = itertools.takewhile(lambda word: word not in ("|", "&&", "<"), shlex.split(line))
        try:
            vastai.parse_line(row, list(words))
        except vastai.UsageError as error:
            yield f"the example {line!r}: {error}"


def argument_faults(row):
    names = [name for arg in row.args if arg.face != "cli" for name in (arg.name, *arg.old)]
    flags = [flag for arg in row.args if arg.face != "sdk" and arg.option for flag in (*arg.flags, *arg.shortcuts)]
    for name, count in collections.Counter(names + flags).items():
        if count > 1:
            yield f"two arguments are called {name}"
    required = []
    for arg in row.args:
        for wrong, fault in (
                (not arg.help and not arg.hidden, "no help"), (arg.name != arg.name.lower(), "capitals in the name"),
                (not {"path", "query", "body", "auto"}.issuperset(arg.to.split()), f"to={arg.to!r}"),
                (arg.face not in FACES, f"face={arg.face!r}")):
            if wrong:
                yield f"{arg.name}: {fault}"
        yield from strangers(row, f"{arg.name}: needs", arg.needs.split())
        for value in (arg.default, arg.cli, *arg.shortcuts.values()):
            if value not in (vastai.REQUIRED, None):
                try:
                    vastai.convert_value(arg, value, False)
                except vastai.UsageError as error:
                    yield str(error)
        if not arg.option and arg.face != "sdk":
            required.append(arg.cli is vastai.REQUIRED)
    if required != sorted(required, reverse=True):
        yield "an argument that is REQUIRED comes after one that is not"


def column_faults(columns):
    for line in columns.text.split("\n") if isinstance(columns, vastai.Columns) else ():
        try:
            (_, _, form, _), = vastai.Columns(line)
        except ValueError:
            form = "?"
        if not (form in vastai.FORMATS or form in vastai.ROW_FORMATS or re.fullmatch(r"(.*{}.*|\.\d[fg])?([*/]\d+)?", form)):
            yield f"{line!r} is not `Header: field format rank`, with a format that Columns explains"
    if isinstance(columns, str):
        yield f"columns=Columns(...), not {columns!r}"


def strangers(row, column, names):
    known = {arg.name for arg in row.args} | {"*"}
    return [f"{column} names {name!r}, which is no argument" for name in sorted(names) if name not in known]


def braces(text):
    """The names in the braces of a text."""
    return {re.match(r"\w*", name).group() for _, name, _, _ in string.Formatter().parse(text) if name is not None}


class TableTest(unittest.TestCase):
    """The table is complete, and what is written from it is fresh."""

    maxDiff = None

    def test_generated_blocks_are_fresh(self):
        for name in BLOCKS:
            with self.subTest(name):
                changes = list(difflib.unified_diff(*map(str.splitlines, block(name)), n=0, lineterm=""))
                if changes:
                    self.fail("\n".join([f"{name} in {BLOCKS[name][0]}: run `python3 test_vastai.py write`", *changes[2:]]))

    def test_no_command_appears_or_vanishes_unseen(self):
        heads = re.findall(r"^[a-z].*?(?= -> | \S+:|$)", SURFACE, re.MULTILINE)
        pinned = {head.split(" /")[0].split(" (")[0] for head in heads}
        advice = ": if that is meant, run `python3 test_vastai.py write`"
        self.assertEqual(set(vastai.COMMANDS) - pinned, set(), "not in the pinned surface" + advice)
        self.assertEqual(pinned - set(vastai.COMMANDS), set(), "in the pinned surface alone" + advice)

    def test_every_row_is_complete(self):
        for row in vastai.COMMANDS.values():
            with self.subTest(row.name):
                faults = dict.fromkeys(faults_of(row))
                if faults:
                    self.fail("\n".join([f"the row of `{row.name}`:", *faults]))

    def test_every_column_is_explained(self):
        for kind, others in ((vastai.Arg, set()), (vastai.Command, {"FUNCTIONS", "group", "hosts"})):
            columns = {name for name, value in vars(kind).items() if name[0] != "_" and not callable(value)}
            columns -= {name for name in columns if isinstance(vars(kind)[name], property)}
            words = re.findall(r"^(\w+(?:, \w+)*)  ", inspect.getdoc(kind), re.MULTILINE)
            self.assertEqual(columns - others - set(", ".join(words).split(", ")), set(), kind.__name__)
        functions = set(re.findall(r"^(\w+) +function \(", inspect.getdoc(vastai.Command), re.MULTILINE))
        self.assertEqual(functions, set(vastai.Command.FUNCTIONS.split()))

    def test_every_table_has_columns_that_can_be_shown(self):
        for name, columns in vars(vastai).items():
            if isinstance(columns, vastai.Columns):
                self.assertEqual(list(column_faults(columns)), [], name)

    def test_what_is_wrong_with_a_row_is_told(self):
        number, name = vastai.Arg("id", vastai.ID, "the thing"), vastai.Arg("--name", vastai.NAME, "its name")

        def row(*args, call="PUT /things/{id}/", safe=True, effect="sets", summary="Change a thing", **columns):
            columns = {"done": "Changed thing {id}.", **columns}
            return vastai.Command("change thing", call, safe, effect, summary, *args or [number, name], **columns)

        def arg(*args, **columns):
            return row(number, vastai.Arg(*args, **columns))

        def table(text):
            return row(columns=vastai.Columns(text))

        self.assertEqual(list(faults_of(row())), [])
        for wrong, told in (
                (row(safe="sets"), "SAFE or ONCE"), (row(effect="set"), "READS, SETS"), (row(summary=number), "as the fifth"), (row(call="PUTS /things/{id}/"), "'PUTS'"),
                (row(call="GET /things/{id}/", safe=False), "a GET is SAFE"), (row(done=""), "done="),
                (row(call="PUT /things/{id}/ -> things[]"), "columns="), (row(look="show things"), "look='show things'"),
                (row(safe=False), "look="), (row(face="all"), "face='all'"), (row(name), "{id}"),
                (row(one_of="name title"), "one_of names 'title'"),
                (row(needs="nam"), "needs names 'nam'"), (row(ask="Change {thing}?"), "ask names 'thing'"),
                (row(ask="?", ask_when="terminals"), "ask_when='terminals'"), (row(ask_when="within"), "without ask="),
                (row(columns="ID: id"), "Columns("), (table("ID: id 0\nName name"), "'Name name'"), (table("ID: id 0\n"), "''"),
                (table("Since: start minutes"), "minutes"), (row(rows=len), "rows= is a function (call, result)"),
                (arg("--name"), "name: no help"), (arg("--name", help="x", to="bodys"), "name: to='bodys'"),
                (arg("--name", help="x", needs="title"), "name: needs names 'title'"),
                (arg("--name", help="x", face="CLI"), "name: face='CLI'"), (arg("--n", vastai.PRICE, "x", "low"), "expected a price"),
                (arg("--kind", help="x", choices="a b", shortcuts={"-c": "c"}), "kind: expected one of a, b"),
                (arg("--id", vastai.ID, "x"), "two arguments are called id"), (arg("--a -b", help="x", shortcuts={"-b": "c"}), "called -b"),
                (row(examples="7 --title x"), "the example '7 --title x': no option"),
                (row(vastai.Arg("at", help="x", default=None), number), "REQUIRED comes after")):
            with self.subTest(told):
                self.assertIn(told, " | ".join(faults_of(wrong)))
        with mock.patch.dict(vastai.COMMANDS, {"change thing": row(run="run_things")}, clear=True):
            self.assertRaisesRegex(ValueError, "'change thing': run='run_things' is no function", vastai.resolve_table)
        self.assertRaisesRegex(ValueError, "'change thing': 'PUT/things/' is not METHOD", row, call="PUT/things/")
        self.assertRaisesRegex(TypeError, "'change thing': there is no column 'ru'", row, ru="run_things")

    def test_functions_name_methods_and_parameters_that_exist(self):
        """call["label"] of a name that nobody gives is None, and call.do() passes over one that its row does not have."""
        source = pathlib.Path(HERE, "vastai.py").read_text(encoding="utf-8")
        known = {arg.name for row in vastai.COMMANDS.values() for arg in row.args}
        known.update(re.findall(r"\bparams\[\"(\w+)\"\] =", source))
        known.update(re.findall(r"(\w+)=", " ".join(re.findall(r"\bparams\.update\(.*\)", source))))
        self.assertEqual(set(re.findall(r"\bcall\[\"(\w+)\"\]", source)) - known, set(), "no argument, and never set in call.params")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "do" and isinstance(node.args[0], ast.Constant):
                name, given = node.args[0].value, {keyword.arg for keyword in node.keywords}
                self.assertTrue(name in vastai.METHODS, f"no method {name!r} for call.do() in line {node.lineno}")
                strange = given - {arg.name for arg in vastai.METHODS[name].args} - {None}
                self.assertEqual(strange, set(), f"no arguments of call.do({name!r}) in line {node.lineno}")

    def test_every_command_explains_itself(self):
        for width in (60, 100, 200):
            for row in vastai.NAMES.values():
                with mock.patch.dict(os.environ, COLUMNS=str(width)):
                    text = vastai.command_help(row)
                self.assertIn(row.name, text)
                for line in text.split("\n"):
                    if not line.startswith("  vastai "):  # an example can be pasted only whole
                        self.assertLessEqual(len(line), max(width, 60), row.name)

    def test_a_method_looks_like_a_function(self):
        client = vastai.VastAI("key")
        for name, row in vastai.METHODS.items():
            method = getattr(client, name)
            parameters = inspect.signature(method).parameters
            self.assertEqual(list(parameters), [arg.name for arg in row.args if arg.face != "cli"], name)
            self.assertEqual(list(inspect.signature(getattr(vastai.VastAI, name)).parameters)[0], "self")
            self.assertEqual(method.__name__, name)
            self.assertIs(pickle.loads(pickle.dumps(getattr(vastai.VastAI, name))), getattr(vastai.VastAI, name))
            for arg in parameters:
                self.assertIn(f"    {arg}: ", method.__doc__)
            if row.path:
                self.assertIn(row.method, method.__doc__)
        self.assertIn("search_offers", dir(client))
        self.assertIn("gpu_name", "".join(pydoc.render_doc(client.launch_instance)))
        self.assertRegex(pydoc.plain(pydoc.render_doc(vastai.VastAI)), r"create_instance\([\s|]*self,[\s|]+id")

    def test_methods_refuse_what_a_function_refuses(self):
        client = vastai.VastAI("key", "http://127.0.0.1:9")
        for call in (lambda: client.create_instance(id=1, imgae="x"), client.create_instance, lambda: client.show_user(1),
                     lambda: client.show_instance(1, id=2), lambda: client.label_instance(1)):
            self.assertRaises(TypeError, call)
        with self.assertRaisesRegex(TypeError, "did you mean 'image'"):
            client.create_instance(id=1, imgae="x")

    def test_methods_can_be_wrapped_patched_and_overridden(self):
        with Sandbox() as box:
            class Louder(vastai.VastAI):
                def show_user(self):
                    return {**super().show_user(), "loud": True}

            self.assertTrue(Louder(box.key, box.url).show_user()["loud"])
            wrapped = functools.wraps(vastai.VastAI.show_user)(lambda self: None)
            self.assertEqual(wrapped.__name__, "show_user")
            with mock.patch.object(vastai.VastAI, "show_user", return_value={"id": 1}):
                self.assertEqual(vastai.VastAI("key").show_user(), {"id": 1})
            stand_in = mock.create_autospec(vastai.VastAI, instance=True)
            stand_in.show_instance(id=5)
            stand_in.show_instance.assert_called_once_with(id=5)

    def test_the_official_modules_names(self):
        code = ("from vastai.sdk import VastAI; from vastai import vastai_sdk; from vastai.utils import parse_env\n"
                "from vastai.api.query import parse_query, offers_fields, offers_alias, offers_mult\n"
                "from vastai.cli.main import main; import sys, vastai\n"
                "assert vastai_sdk.VastAI is VastAI is vastai.VastAI and VastAI('key').client.api_key == 'key'\n"
                "assert parse_query('gpu_ram>=24 dph<1', {}, offers_fields, offers_alias, offers_mult) == "
                "{'gpu_ram': {'gte': 24000.0}, 'dph_total': {'lt': '1'}}\n"
                "assert parse_env('-e A=1') == {'A': '1'} and not hasattr(vastai, 'offers_other')\n"
                "sys.modules['vastai_sdk'] = vastai  # as the file of that name in the wheel does\n"
                "from vastai_sdk.serverless.client.client import Serverless; assert Serverless is vastai.Serverless")
        subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)


# -------------------------------------------------------------------------------------- the sandbox


class DocumentTest(CommandCase):
    """`help --raw`: the table for programs."""

    def test_the_document(self):
        document = self.raw("help")
        rows = {row["name"]: row for row in document["commands"]}
        self.assertEqual(list(rows), list(vastai.COMMANDS))
        disk = {arg["name"]: arg for arg in rows["create instance"]["arguments"]}["disk"]
        self.assertEqual((disk["type"], disk["default"], disk["unit"], disk["flags"], disk["required"]),
                         ("float", 10, "GB", ["--disk"], False))
        units = {f"{name} {arg['name']}": arg["unit"] for name, row in rows.items() for arg in row["arguments"]}
        for name, unit in {"run max_hours": "hours", "run bid_over": "percent", "create instance price": "$/hr",
                           "list machine price_disk": "$/GB/month", "transfer credit amount": "$", "create endpoint max_queue_time": "seconds",
                           "create instance id": None}.items():
            self.assertEqual(units[name], unit, name)
        kind = {arg["name"]: arg for arg in rows["search offers"]["arguments"]}["type"]
        self.assertEqual(kind["choices"], vastai.DEMAND.split())
        self.assertEqual((rows["create instance"]["method"], rows["ssh"]["method"]), ("create_instance", None))
        self.assertEqual(rows["show instances"]["returns"], "list[Instance]")
        self.assertEqual([row["effect"] for row in rows.values()], [row.effect for row in vastai.COMMANDS.values()])
        for name, statuses in (("create instance", {129, 130, 143}), ("launch instance", {129, 130, 143}),
                               ("run", {129, 130, 141, 143}), ("self-test machine", {129, 130, 143}), ("cost", {130})):
            self.assertEqual({status for status in rows[name]["exit_statuses"] if status > 99}, statuses, name)
        self.assertLessEqual({3, 4, 5, 6}, set(rows["watch offers"]["exit_statuses"]))
        self.assertNotIn(3, rows["completion"]["exit_statuses"])
        for name, statuses in (("create instance", {7, 8, 9}), ("show user", set()), ("cost", {8}),
                               ("destroy instances", {8}), ("wait instance", {9}), ("create api-key", {7})):
            self.assertEqual(set(rows[name]["exit_statuses"]) & {7, 8, 9}, statuses, name)
        self.assertEqual(self.box.requests, [])

    def test_every_kind_of_error_is_explained(self):
        readme = pathlib.Path(HERE, "README.md").read_text(encoding="utf-8")
        for family in (vastai.VastAIError, *vastai.VastAIError.__subclasses__()):
            name, status = family.__name__, str(family.exit_status)
            if family.__module__ == "vastai" and family is not vastai.ProgramError:
                self.assertIn(name, vastai.__all__)
                self.assertIn(status, vastai.EXIT_STATUSES, f"EXIT_STATUSES lacks that of {name}")
                self.assertRegex(readme, rf"(?m)^\| {status} \| .* `{name}`", f"{name} is not in the README's exit statuses")
        signals = {"0", "129", "130", "141", "143"}
        self.assertEqual(vastai.EXIT_STATUSES.keys() - signals, {str(status) for status in range(1, 10)})

    def test_parts_of_it(self):
        self.assertEqual([row["name"] for row in self.raw("help show instance")["commands"]], ["show instance"])
        verbs = {row["name"].split()[0] for row in self.raw("help tfa")["commands"]}
        self.assertEqual(verbs, {"tfa"})
        self.assertIn("usage: vastai show instance", self.ok("help show instance"))
        self.assertIn("tfa login", self.ok("help tfa"))
        self.assertEqual(self.run_here("help nonsense --raw")[0], 2)


class WordsTest(unittest.TestCase):
    """The texts that people read are plain American English, as far as a program can tell."""

    maxDiff = None

    VERBS = set(
        "Accept Activate Add Announce Attach Benchmark Cancel Change Choose Clone Copy Create Delete Destroy End Explain "
        "Find Get Invite Label Launch List Offer Open Pack Prepay Print Prove Push Put Regroup Reject Remove Rename Rent "
        "Replace Restart Recreate Revoke Run Save Schedule Search Send Set Show Start Stop Transfer Turn Uninstall Update "
        "Wait Watch Write".split()
    )
    # "where" that means "if": after a comma, or after a word that no place follows
    WHERE = (
        r"(?:^|[.;] )where [^.:,]*, (?!and\b)|[,;] where (?!the )"
        r"|\b(?!(?:say|said|show|see|know|look|find|list|place|ask|tell|told)(?:s|ed|ing)?\b|to\b|of\b|from\b|and\b|or\b|"
        r"is\b|it\b|folder\b|machine\b)[a-z\"')]+ where\b"
    )
    FORBIDDEN = {
        "write should, or the present tense": r"\bshall\b",
        "write again": r"\banew\b",
        "say it plainly": r"\bsuch as it is\b|\bas it is said\b",
        "write is saved, or stays": r"\bis kept\b",
        "write if": WHERE,
        "write cannot be combined with": r"\b(?:does|do) not go (?:together )?with\b",
        "write $0.41/hr": r"(?:\b\d[\d.,]*|[A-Za-z]}) \$(?:/| |,|;|$)(?! *\d)",
        "write email": r"\bmail(?:s|ed)?\b(?! address)(?!\.)|\bmail address",
        "write can be repeated": r"\bmay be given again\b",
        "write American English": r"\b(?:labelled|colour|centre|licence|behaviour|favour|whilst|grey|for ever)\b",
        "say it with a verb": r"\bin place of\b",
    }
    IN_STRINGS = {  # in what the program says, but not in docstrings and comments
        "no HTTP 200 in an error": r"\bHTTP 200\b",
        "one form: no instance 33; see `vastai show instances`":
            r"\b(?:you have no|there is no|no such|cannot find (?:the )?|not found:?) ?(?:instance|machine|offer|template|volume"
            r"|endpoint|workergroup|cluster|team|role|webhook|key)\b",
        "write spaces": r"\bblanks?\b",
        "write sent": r"\bthe service gave\b",
        "write canceled": r"(?<!{)\bcancelled\b",
        "write is billed": r"\bgoes on costing\b|\bcosts? money\b",
    }

    def texts(self, name):
        """(line, kind, text) of each string, docstring and run of comments of a file."""
        source = pathlib.Path(HERE, name).read_text("utf-8")
        if not name.endswith(".py"):
            for number, line in enumerate(source.split("\n"), 1):
                yield number, "prose", line
            return
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = list(ast.walk(ast.parse(source)))
        docstrings = {id(node.body[0].value) for node in nodes
                      if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}
        inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
        for node in nodes:
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "{x}" for part in node.values)
                yield node.lineno, "string", "".join(parts)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                kind = "docstring" if id(node) in docstrings else "string"
                yield node.lineno, kind, " ".join(node.value.split()) if kind == "docstring" else node.value
        first, last, words = 0, -1, []
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                if token.start[0] != last + 1 and words:
                    yield first, "comment", " ".join(words)
                    words = []
                first, last = (first if words else token.start[0]), token.start[0]
                words.append(token.string.lstrip("# "))
        yield first, "comment", " ".join(words)

    def test_no_word_of_the_list(self):
        found = []
        for name in ("vastai.py", "README.md"):
            for line, kind, text in self.texts(name):
                if len(text.split()) < 3:
                    continue
                rules = {**self.FORBIDDEN, **(self.IN_STRINGS if kind in ("string", "prose") else {})}
                for rule, pattern in rules.items():
                    for hit in re.finditer(pattern, text, re.IGNORECASE):
                        around = text[max(hit.start() - 50, 0):hit.end() + 40].replace("\n", " ")
                        found.append(f"{name}:{line}: {rule}: …{around}…")
        self.assertEqual(found, [], "\n" + "\n".join(found))

    def rows(self):
        """Each command of the table once."""
        return {id(row): row for row in vastai.COMMANDS.values()}.values()

    def test_a_summary_is_a_short_imperative(self):
        for row in self.rows():
            with self.subTest(row.name):
                words = row.summary.split()
                self.assertLessEqual(len(words), 8, row.summary)
                self.assertFalse(row.summary.endswith((".", "!", "…")), row.summary)
                self.assertTrue(words[0] in self.VERBS, f"{row.summary}: begin with one of VERBS, or add a verb there")
                self.assertLessEqual(len(row.summary), 54, "it has to stand in a list: " + row.summary)

    def test_the_help_of_an_argument_is_a_phrase(self):
        for row in self.rows():
            for arg in row.args:
                if arg.help:
                    with self.subTest(f"{row.name} {arg.label(True)}"):
                        self.assertFalse(arg.help.endswith("."), arg.help)
                        self.assertFalse(re.match(r"(?!Docker )[A-Z][a-z]* [a-z]", arg.help), arg.help)
                        unit = {"GB": "GB", "SECONDS": "seconds", "HOURS": "hours"}.get(arg.kind.metavar)
                        if unit and not arg.hidden and "same as" not in arg.help:
                            self.assertIn(unit, arg.help, "the unit is missing")

    def test_what_is_said_is_a_sentence(self):
        for row in self.rows():
            for text in (*row.done.split("|"), row.empty, row.note):
                with self.subTest(row.name, text=text):
                    self.assertRegex(text, r"^(?:|\{.*|[A-Z0-9].*|`.*|--.*)$")
                    if (text and row.says is None) or text in (row.empty, row.note):
                        self.assertRegex(text, r"^$|[.!)}]$")
            if isinstance(row.ask, str) and row.ask:
                self.assertRegex(row.ask, r"^[A-Z].*[?.]$", row.name)

    def test_a_docstring_speaks_of_parameters(self):
        for row in self.rows():
            if row.face == "cli":
                continue
            text = getattr(vastai.VastAI, row.methods[0]).__doc__
            with self.subTest(row.name):
                text = text.partition("\nCommand line:")[0]
                for arg in row.args:
                    for flag in arg.flags if arg.option and arg.flags[-1] != "--env" else ():
                        self.assertNotRegex(text, rf"(?<![-\w]){flag}(?![-\w])")
                self.assertNotRegex(text, r"the exit status is|can be repeated|rest of the line")
                self.assertNotRegex(text, r"(?:from|for|of) (?:search|show|create) [a-z]+s?(?:-[a-z]+)?$")
                if any(arg.kind is vastai.QUERY for arg in row.args) and row.fields:
                    self.assertIn("Fields of the query:", text)

    def test_ids_have_one_name(self):
        """INSTANCE, MACHINE, OFFER; never ID here and INSTANCE-ID there."""
        for row in self.rows():
            if row.face == "sdk":
                continue
            for arg in row.args:
                if arg.face == "sdk" or arg.hidden:
                    continue
                with self.subTest(f"{row.name} {arg.label(True)}"):
                    word = arg.kind.metavar if arg.option else vastai.word_of(arg)
                    self.assertNotRegex(word, r"[-_]IDS?$|^IDS$")
                    if not arg.option:
                        self.assertNotRegex(word, r"^ID$")
                    for thing in ("instance", "machine"):
                        if re.fullmatch(rf"(?:\w+_)?{thing}(?:_ids?)?", arg.name) and arg.kind is not vastai.FLAG:
                            self.assertEqual(word, thing.upper())

    def test_a_list_of_ids_takes_blanks_and_commas(self):
        lists = 0
        for row in self.rows():
            for arg in row.args:
                if arg.option or arg.face == "sdk" or not (arg.many and arg.kind.annotation == "Sequence[int]"):
                    continue
                lists += 1
                after = {"add network-disk": ["/mnt/disk1"], "create instances": ["--image", "a/b"]}.get(row.name, [])
                before = {"join cluster": ["7"]}.get(row.name, [])
                for words in (["11", "12", "13"], ["11,12,13"], ["11,", "12", ",13"], ["11, 12 13"], ["11 12,13"]):
                    with self.subTest(row.name, words=words):
                        given, _ = vastai.parse_line(row, [*before, *words, *after])
                        values = vastai.check_params(row, given, cli=True)[arg.name]
                        self.assertEqual(list(values), [11, 12, 13])
        self.assertGreater(lists, 8)


class OneFormTest(CommandCase):
    """What is not there is said in one sentence, with the command that lists such things."""

    def test_not_found(self):
        for line, look in (("show instance 99", "show instances"), ("destroy instance 99 -y", "show instances"),
                           ("ssh 99", "show instances"), ("label instance 99 x", "show instances"),
                           ("show instance nobody", "show instances"), ("show deployment 99", "show deployments"),
                           ("delete scheduled-job 99", "show scheduled-jobs"), ("delete volume 99", "show volumes"),
                           ("show team-role x", "show team-roles"), ("delete endpoint 99", "show endpoints")):
            with self.subTest(line):
                status, out, err = self.run_here(line)
                self.assertEqual((status, out), (4, ""))
                self.assertRegex(err, rf"^[^\n]*[^.\n]; see `vastai {look}`\n$")

    def test_a_refusal_without_an_http_failure_names_no_status(self):
        self.box.fail("PUT /api/v0/instances/30000001/", status=200, body='{"success": false, "msg": "not now"}')
        self.assertEqual(self.run_here("label instance 30000001 x"), (1, "", "label instance: not now\n"))


class SandboxTest(unittest.TestCase):
    """What a test, or somebody who tries things out, can make the simulated service do."""

    def setUp(self):
        self.now = 1_800_000_000.0
        self.box = Sandbox(boot=60, clock=lambda: self.now)
        self.addCleanup(self.box.close)
        self.client = vastai.VastAI(self.box.key, self.box.url)
        self.addCleanup(self.client.close)

    def rented(self, **terms):
        """The id of an instance on a machine of its own."""
        offer = self.box.offer(dph_base=0.1, min_bid=0.05)
        return self.client.create_instance(id=offer["id"], image="i", **terms)["new_contract"]

    def states(self, id, after=0.0):
        """(actual, current, next and intended state) of an instance, some seconds later."""
        self.now += after
        row = self.client.show_instance(id)
        return tuple(row[name] for name in ("actual_status", "cur_state", "next_state", "intended_status"))

    def test_an_instance_starts_and_stops(self):
        id = self.rented()
        self.assertEqual(self.states(id), ("created", *["running"] * 3))
        self.assertEqual(self.states(id, 10), ("loading", *["running"] * 3))
        self.assertEqual(self.states(id, 60), ("running", *["running"] * 3))
        self.client.stop_instance(id)
        self.assertEqual(self.states(id), ("exited", *["stopped"] * 3))

    def test_machines_that_are_no_good(self):
        self.box.machine(5, starts=False, message="no space left on device", differs={"disk_space": 8.0})
        self.box.machine(6, status="offline")
        for machine_id, status in ((5, "loading"), (6, "offline"), (7, "running")):
            offer = self.box.offer(machine_id=machine_id)
            id = self.client.create_instance(id=offer["id"], image="i", disk=20)["new_contract"]
            self.assertEqual(self.states(id, 10_000)[0], status)
            row = self.client.show_instance(id)
            self.assertEqual(row["disk_space"], 8.0 if machine_id == 5 else 20.0)
            self.assertEqual("no space" in str(row["status_msg"]), machine_id == 5)

    def test_a_low_bid_is_refused_and_leaves_an_instance(self):
        offer = self.box.offer(min_bid=0.2)
        with self.assertRaisesRegex(vastai.VastAIError, "below the minimum") as caught:
            self.client.create_instance(id=offer["id"], image="i", price=0.1)
        self.assertEqual(caught.exception.status, 400)
        id = caught.exception.body["new_contract"]
        self.assertEqual(self.states(id), ("created", *["stopped"] * 3))
        self.assertTrue(self.client.show_instance(id)["is_bid"])

    def test_outbid(self):
        id = self.rented(price=0.06)
        self.assertEqual(self.states(id, 60)[0], "running")
        self.box.outbid(id)
        self.assertEqual(self.states(id), ("exited", *["stopped"] * 3))
        self.client.change_bid(id, 0.2)
        self.assertEqual(self.states(id, 60)[0], "running")

    def test_an_answer_that_is_lost_although_the_request_took_place(self):
        before = set(self.box.market.tables["instances"])
        self.box.lose("PUT /api/v0/asks/.*")
        self.assertRaises(vastai.OutcomeUnknownError, self.rented)
        self.box.lose("PUT /api/v0/asks/.*", status=502)
        self.assertRaises(vastai.OutcomeUnknownError, self.rented)
        self.assertEqual(len(set(self.box.market.tables["instances"]) - before), 2)

    def test_a_new_instance_is_not_there_at_once(self):
        for hidden_as in (None, 404):
            self.box.machine(hidden=3, hidden_as=hidden_as)
            id = self.rented()
            try:
                self.assertIsNone(self.client.show_instance(id))
            except vastai.NotFoundError as error:
                self.assertEqual(hidden_as, error.status)
            self.assertNotIn(id, [row["id"] for row in self.client.show_instances()])
            self.assertEqual(self.states(id, 3)[0], "loading")

    def test_what_things_cost(self):
        id = self.rented(disk=72)
        row = self.client.show_instance(id)
        self.assertAlmostEqual(row["storage_total_cost"], row["storage_cost"] * 72 / 720)
        self.assertAlmostEqual(row["dph_total"], 0.1 + row["storage_total_cost"], 5)
        before = self.client.show_user()["credit"]
        self.now += HOUR
        others = sum(other.row["dph_total"] if other.goal == "running" else other.disk_per_hour
                     for other in self.box.market.rows("instances"))
        self.assertAlmostEqual(before - self.client.show_user()["credit"], others, 4)
        self.client.create_volume(next(iter(self.box.market.tables["volume_offers"])), size=72)
        volume, = self.client.show_volumes()
        self.assertAlmostEqual(volume["storage_total_cost"], volume["storage_cost"] / 10)
        self.assertEqual(self.states(id, 10_000 * HOUR)[3], "stopped", "the credit is used up")

    def test_charges_of_the_last_day(self):
        answer = self.client.show_invoices_v1(charges=True, start_date=self.now - DAY, end_date=self.now)
        items = [item for row in answer["results"] for item in row["items"]]
        self.assertEqual({item["type"] for item in items}, {"gpu", "disk", "bwd", "bwu"})
        self.assertTrue(all(self.now - DAY <= item["start"] <= item["end"] <= self.now for item in items))

    def test_workers_are_instances(self):
        endpoint = next(iter(self.box.market.tables["endpoints"]))
        ids = self.box.workers(endpoint, 2)
        self.assertEqual([row["id"] for row in self.client.get_endpt_workers(endpoint)], ids)
        self.assertLessEqual(set(ids), {row["id"] for row in self.client.show_instances()})


class SubCommandTest(unittest.TestCase):
    """`python3 test_vastai.py NAME`."""

    def run_process(self, *words, **options):
        options = {"env": clean_environment(HERE, NO_COLOR="", TERM="xterm"), **options}
        done = subprocess.run([sys.executable, __file__, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, encoding="utf-8", timeout=60, **options)
        return Ended(done.returncode, done.stdout, done.stderr)

    def test_help(self):
        status, out, err = self.run_process("--help")
        self.assertEqual((status, err), (0, ""))
        for name in ("demo", "sandbox", "write", "bench", "THE SIMULATED SERVICE", "the pinned surface"):
            self.assertIn(name, out)

    @unittest.skipUnless(os.name == "posix", "signals of POSIX")
    def test_all_tests_on_all_cores(self):
        """Whatever happens to a test class or to the process that runs it, the end tells of it.

        CPython 3.12.1 alone does not count a skipped test as one that ran.
        """
        program = """
import os, signal, sys, tempfile, time, unittest
import test_vastai
test_vastai.TOO_LONG = 3
class Good(unittest.TestCase):
    def test_home(self):
        self.assertEqual(os.environ["HOME"], tempfile.gettempdir())
        print("no answer")
    @unittest.skip("so")
    def test_skipped(self): pass
class Bad(unittest.TestCase):
    def test_bad(self): self.fail("as it should")
    def test_error(self): 1 / 0
class Void(Good):
    def run(self, result): pass
class Killed(Good):
    def test_home(self): os.kill(os.getpid(), signal.SIGKILL)
class Leaves(Good):
    def test_home(self): os._exit(0)
class Hangs(Good):
    def test_home(self): time.sleep(60)
class Last(Good):
    pass
if "good" in os.environ: del Bad, Void, Killed, Leaves, Hangs
sys.exit(test_vastai.main(sys.argv))
"""
        with temporary_folder() as folder:
            words = [sys.executable, os.path.join(folder, "program.py")]
            pathlib.Path(words[1]).write_text(program)
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60,
                       "encoding": "utf-8", "env": clean_environment(folder, PYTHONPATH=HERE)}
            done = subprocess.run(words, **options)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            for told in ("AssertionError: as it should", "ZeroDivisionError", "ERROR: Void\n", "No test ran.",
                         "ERROR: Killed\n", "ended with status -9", "ERROR: Leaves\n", "ended with status 0",
                         "ERROR: Hangs\n", "Timeout", "in test_home"):
                self.assertIn(told, done.stderr)
            self.assertRegex(done.stderr, r"\nRan [46] tests in [\d.]+s\n\nFAILED \(failures=1, errors=5, skipped=2\)\n$")
            options["env"]["good"] = "yes"
            done = subprocess.run(words, **options)
            self.assertEqual((done.returncode, done.stdout), (0, ""), done.stderr)
            self.assertRegex(done.stderr, r"\nRan [24] tests in [\d.]+s\n\nOK \(skipped=2\)\n$")

    def test_a_port_in_use(self):
        with Sandbox() as box:
            port = box.url.rpartition(":")[2]
            status, out, err = self.run_process("sandbox", "--port", port)
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, rf"^sandbox: cannot use port {port}: .*\n  Choose another --port")

    def test_the_sandbox_brings_its_programs(self):
        if not CAN_STAND_IN:
            self.skipTest("no shell here, or no setsid")
        words = [sys.executable, __file__, "sandbox"]
        options = {"env": clean_environment(HERE), "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(words, **options)
        self.addCleanup(process.kill)
        exports = "".join(process.stdout.readline() for _ in range(3))
        script = exports + "vastai ssh $(vastai show instances --status running --quiet) nvidia-smi"
        done = subprocess.run(["sh", "-c", script], timeout=60, **options)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        self.assertEqual((done.stdout, process.returncode), ("NVIDIA-SMI 570.124 (simulated)\n", 0))

    @unittest.skipUnless(os.name == "posix", "needs a pseudo-terminal")
    def test_the_demo(self):
        environment = clean_environment(HERE, TERM="xterm", COLUMNS="80")
        words = [sys.executable, __file__, "demo", "first", "run", "serverless", "--boot", "0.1"]  # the other waits for long
        with Terminal(words, environment) as terminal:
            out = terminal.expect("README.md", 30)
            self.assertEqual(terminal.status(), 0)
        self.assertIn("\033[1m$ vastai search offers", out)
        self.assertRegex(out, "\033\\[\\d+mrunning")
        lines = re.sub(r"\033\[[\d;]*[mK]", "", out).replace("\r\n", "\n").split("\n")
        tables = [line for line in lines if line.startswith("#") or "  " in line.strip()]  # what a terminal wraps badly
        self.assertGreater(len(tables), 30)
        self.assertEqual([line for line in tables if len(line.rpartition("\r")[2]) > 80], [])


# ---------------------------------------------------------------- every command, once in both faces

ANY = object()


class Use:
    """How a command is used: a line of words, and the arguments of its method; where there are none, the line's.

    `before` gets (client, market) and prepares; `same` turns the method's result into what --raw prints (ANY: something
    else), `exit` is the status, `stdin` what the command is told, `json` that JSON is what readers get as well.
    """

    def __init__(self, line="", *args, before=None, same=None, exit=0, stdin="", json=False, **given):
        self.line, self.given = line, given
        self.args = args or (() if given else tuple(shlex.split(line)))
        self.before, self.same, self.exit, self.stdin, self.json = before, same, exit, stdin, json


def uses(at, folder):
    """{command: Use} for all of them; `at` is a market as it is at first, `folder` a place for files."""
    def file(name, content):
        path = os.path.join(folder, name)
        with open(path, "w") as target:
            target.write(content)
        return path

    def without(*names):
        return lambda rows: [{name: value for name, value in row.items() if name not in names} for row in rows]

    def first(table, rank=0):
        return list(at.tables[table])[rank]

    def bring(sdk, market):
        """Makes the running instance's SSH port one that answers."""
        address = ("127.0.0.1", urllib.parse.urlsplit(sdk.server_url).port)
        market.tables["instances"][running].behavior["address"] = address

    running, stopped = at.tables["instances"]
    free = [row["id"] for row in at.rows("offers") if row["rentable"] and row["num_gpus"] == 1]
    offer, machine, machine2 = free[0], first("machines"), first("machines", 1)
    volume_offer, endpoint, group = first("volume_offers"), first("endpoints"), first("workergroups")
    template_id, template = first("templates"), at.rows("templates")[0]["hash_id"]
    new, today = next(at.ids), time.strftime("%Y-%m-%d")
    deployment, ssh_key, api_key = first("deployments"), first("ssh_keys"), first("api_keys")
    cluster, disk, method, role = first("clusters"), first("network_disks"), first("tfa_methods"), first("roles")
    connection, member = first("connections"), first("members", 1)
    permissions = {"api": {"misc": {}}}
    permission_file, account = file("permissions.json", json.dumps(permissions)), {"fullname": "A. Example"}
    job = dict(start_time=at.born, end_time=at.born + DAY, api_endpoint=f"/api/v0/instances/reboot/{running}/",
               request_method="PUT", request_body={}, frequency="DAILY", instance_id=running, hour_of_the_day=3)
    preferences = {"client": {"low_credit": {"email": True, "webhooks": False}}}
    secret = {"secret": "5ec2e7", "code": "123456"}

    def volume(sdk, market):
        sdk.create_volume(volume_offer, size=20, name="data")

    def webhook(sdk, market):
        sdk.create_webhook("https://example.com/hook", ["client:low_credit"])

    def maintenance(sdk, market):
        sdk.schedule_maint(machine, at.born, 2)

    def session(sdk, market):
        vastai.write_private(vastai.own_file("config", "vast_tfa_key"), "session-key")

    def scheduled(sdk, market):
        sdk.create_scheduled_job(**job)

    return {
        "search offers": Use("'gpu_name=RTX_4090 num_gpus=1' -o dph --limit 3", query="gpu_name=RTX_4090 num_gpus=1",
                             order="dph", limit=3, same=without("datacenter")),
        "watch offers": Use("num_gpus=1 --max-wait 0", exit=9, same=ANY, json=True),
        "watch instances": Use("--once --max-wait 0", exit=9, same=ANY),
        "search offers-new": Use(query="num_gpus=1", limit=2),
        "cost": Use(same=ANY),  # what it costs changes with each look
        "search templates": Use("recommended=true"),
        "show template": Use(f"{template_id}"),
        "create instance": Use(f"{offer} --image vastai/pytorch", offer, image="vastai/pytorch"),
        "create instances": Use(f"{free[0]} {free[1]} --image vastai/pytorch", free[:2], image="vastai/pytorch"),
        "launch instance": Use("-g RTX_4090 -n 1 -i vastai/pytorch", "RTX_4090", "1", "vastai/pytorch"),
        "show instances": Use(),
        "show instances-v1": Use(params={"limit": 1}),
        "show instance-filters": Use(),
        "show instance": Use(f"{running}"),
        "start instance": Use(f"{stopped}"),
        "stop instance": Use(f"{running}"),
        "destroy instance": Use(f"{stopped} -y", stopped),
        "start instances": Use(f"{running} {stopped}", [running, stopped]),
        "stop instances": Use(f"{running} {stopped}", [running, stopped]),
        "destroy instances": Use(f"{running} {stopped} -y", [running, stopped]),
        "reboot instance": Use(f"{running}"),
        "recycle instance": Use(f"{running}"),
        "label instance": Use(f"{running} 'my own'"),
        "update instance": Use(f"{running} --image vastai/base-image", running, image="vastai/base-image"),
        "prepay instance": Use(f"{running} 5"),
        "change bid": Use(f"{running} --price 0.9", running, 0.9),
        "execute": Use(f"{running} 'ls -l /workspace' --max-wait 0.05", running, "ls -l /workspace", max_wait=0.05),
        "logs": Use(f"{running} --tail 3 --filter loss --max-wait 0.05", running, tail="3", filter="loss",
                    max_wait=0.05),
        "wait instance": Use(f"{running}"),
        "ssh": Use(f"{running} -- nvidia-smi -L", before=bring, same=ANY),
        "scp": Use(f"{running}:/workspace/train.py {folder}", before=bring, same=ANY),
        "ssh-url": Use(f"{running}"),
        "scp-url": Use(f"{running}"),
        "create template": Use("--name mine --image a/b --ssh", name="mine", image="a/b", ssh=True,
                               same=ANY),  # the command line has conditions of its own
        "update template": Use(f"{template} --name mine --image a/b", template, name="mine", image="a/b", same=ANY),
        "delete template": Use(f"--hash-id {template}", hash_id=template),
        "search volumes": Use("'disk_space>=10' --limit 2", query="disk_space>=10", limit=2),
        "search network-volumes": Use("--limit 2", limit=2),
        "show volumes": Use(before=volume),
        "create volume": Use(f"{volume_offer} -s 20 -n data", volume_offer, 20, "data"),
        "create network-volume": Use(f"{first('network_offers')}"),
        "clone volume": Use(f"{new} {first('volume_offers', 1)}", before=volume),
        "delete volume": Use(f"{new}", before=volume),
        "list volume": Use(f"{machine} -s 20 -p 0.2", machine, 20, 0.2),
        "list volumes": Use(f"{machine} {machine2}", [machine, machine2]),
        "unlist volume": Use(f"{volume_offer}"),
        "list network-volume": Use(f"{disk}"),
        "unlist network-volume": Use(f"{first('network_offers')}"),
        "show network-disks": Use(),
        "add network-disk": Use(f"{machine} {machine2} /mnt/disk2", [machine, machine2], "/mnt/disk2"),
        "copy": Use(f"local:{folder} C.{running}:/workspace/data"),
        "cancel copy": Use(f"{running}"),
        "cancel sync": Use(f"{running}"),
        "cloud copy": Use(f"--src /workspace --dst backups --instance {running} --connection {connection}",
                          src="/workspace", dst="backups", instance=running, connection=connection),
        "show connections": Use(),
        "take snapshot": Use(f"{running} --repo ada/train", running, repo="ada/train"),
        "show instance-backups": Use(),
        "show instance-backup-files": Use(f"{running}"),
        "show deployments": Use(),
        "show deployment": Use(f"{deployment}"),
        "show deployment-versions": Use(f"{deployment}"),
        "start deployment": Use(f"{deployment}"),
        "stop deployment": Use(f"{deployment}"),
        "delete deployment": Use("--name square", name="square"),
        "show pending-price-increases": Use(),
        "accept price-increase": Use(f"{running} -y", running, same=ANY),
        "reject price-increase": Use(f"{running} -y", running, same=ANY),
        "search benchmarks": Use("'gpu_name=RTX_4090'"),
        "search benchmarks-v1": Use(params={"limit": 2}),
        "show gpu-metrics": Use("--verified true", verified="true"),
        "show gpu-trends": Use("RTX_4090 --step 21600", "RTX_4090", step=21600),
        "show gpu-locations": Use("--gpu RTX_4090", gpu="RTX_4090"),
        "set api-key": Use("another-key", same=ANY),
        "show ssh-keys": Use(),
        "create ssh-key": Use(f"'{SSH_KEY}'"),
        "attach ssh": Use(f"{running} '{SSH_KEY}'"),
        "show instance-ssh-keys": Use(f"{running}", before=lambda sdk, market: sdk.attach_ssh(running, SSH_KEY)),
        "detach ssh": Use(f"{running} {new}", before=lambda sdk, market: sdk.attach_ssh(running, SSH_KEY)),
        "update ssh-key": Use(f"{ssh_key} '{SSH_KEY}'"),
        "delete ssh-key": Use(f"{ssh_key}"),
        "show api-keys": Use(same=lambda rows: {"apikeys": rows}),
        "show api-key": Use(f"{api_key}"),
        "create api-key": Use(f"--name ci --permission_file {permission_file}", "ci", permissions),
        "delete api-key": Use(f"{api_key}"),
        "reset api-key": Use(),
        "set role": Use("client", same=ANY),
        "show env-vars": Use(same=lambda names: dict.fromkeys(names, "*****")),
        "create env-var": Use("NAME value"),
        "update env-var": Use("HF_TOKEN other"),
        "delete env-var": Use("HF_TOKEN"),
        "tfa login": Use("-t totp -c 123456", code="123456", method_type="totp"),
        "tfa logout": Use(before=session),
        "tfa status": Use(),
        "tfa auth-new": Use("--secret 5ec2e7 --code 123456", **secret),
        "tfa totp-setup": Use(),
        "tfa send-sms": Use("-p +12025550123", "+12025550123"),
        "tfa resend-sms": Use("-s 5ec2e7", "5ec2e7"),
        "tfa send-email": Use(),
        "tfa activate": Use("123456 --secret 5ec2e7", **secret),
        "tfa update": Use(f"{method} -l spare", method, "spare"),
        "tfa delete": Use(f"-id {method} -t totp -c 123456 -y", code="123456", method_type="totp",
                          id_to_delete=method),
        "tfa regen-codes": Use("-c 123456 -y", code="123456", stdin="3\ny\n"),
        "create team": Use("--team-name lab", "lab"),
        "destroy team": Use(),
        "show members": Use(),
        "invite member": Use("--email kit@example.com --role developer", "kit@example.com", "developer"),
        "remove member": Use(f"{member}"),
        "show team-roles": Use(),
        "show team-role": Use("developer"),
        "create team-role": Use(f"--name reader --permissions {permission_file}", "reader", permissions),
        "update team-role": Use(f"{role} --name reader", role, "reader"),
        "remove team-role": Use("developer"),
        "show machines": Use(same=lambda rows: {"machines": rows}),
        "show machine": Use(f"{machine}", same=lambda row: [row]),
        "list machine": Use(f"{machine} -g 0.5 -m 1", machine, price_gpu=0.5, min_chunk=1),
        "list machines": Use(f"{machine} {machine2} -g 0.5", [machine, machine2], price_gpu=0.5),
        "unlist machine": Use(f"{machine}"),
        "delete machine": Use(f"{machine2}"),
        "cleanup machine": Use(f"{machine}"),
        "defrag machines": Use(f"{machine} {machine2}", [machine, machine2]),
        "set min-bid": Use(f"{machine} --price 0.1", machine, 0.1),
        "set defjob": Use(f"{machine} --price_gpu 0.1 --image miner/xmr --args -o pool", machine, price_gpu=0.1,
                          image="miner/xmr", args=["-o", "pool"]),
        "remove defjob": Use(f"{machine}", before=lambda sdk, market: sdk.set_defjob(machine, image="miner/xmr")),
        "show maints": Use(f"-i {machine}", [machine], before=maintenance),
        "schedule maint": Use(f"{machine} --sdate 1899900000 --duration 0.5 -y", machine, 1899900000, 0.5),
        "cancel maint": Use(f"{machine} -y", machine, before=maintenance),
        "reports": Use(f"{machine}"),
        "show clusters": Use(),
        "create cluster": Use(f"10.12.0.0/24 {machine}"),
        "delete cluster": Use(f"{cluster}"),
        "join cluster": Use(f"{cluster} {machine2}", cluster, [machine2]),
        "remove-machine-from-cluster": Use(f"{cluster} {machine} {machine2}"),
        "show overlays": Use(),
        "create overlay": Use(f"{cluster} mesh-b"),
        "join overlay": Use(f"mesh-a {running}"),
        "delete overlay": Use("mesh-a"),
        "show user": Use(),
        "show audit-logs": Use(before=lambda sdk, market: sdk.stop_instance(running)),
        "set user": Use("--file " + file("account.json", json.dumps(account)), account),
        "show subaccounts": Use(),
        "create subaccount": Use("--email kit@example.com --username kit --password pass-word", "kit@example.com",
                                 "kit", "pass-word"),
        "show ipaddrs": Use(),
        "show invoices": Use(f"-s {today}", start_date=today, same=lambda both: both["invoices"]),
        "show invoices-v1": Use("-c", charges=True),
        "generate pdf-invoices": Use(pdf=os.path.join(folder, "items.pdf")),
        "search invoices": Use("'amount_cents>1000'"),
        "show earnings": Use(f"-s 2026-01-01 -e 2026-01-03 -m {machine}", "2026-01-01", "2026-01-03", machine),
        "show deposit": Use(f"{running}"),
        "transfer credit": Use("grace@example.com 2 -y", "grace@example.com", 2),
        "fetch contracts": Use("", "training", [running]),
        "show scheduled-jobs": Use(before=scheduled),
        "delete scheduled-job": Use(f"{new}", before=scheduled),
        "create scheduled-job": Use(**job),
        "update scheduled-job": Use("", new, {}, before=scheduled),
        "show endpoints": Use(),
        "create endpoint": Use("--endpoint_name chat --max_workers 3", endpoint_name="chat", max_workers=3),
        "update endpoint": Use(f"{endpoint} --max_workers 3", endpoint, max_workers=3),
        "delete endpoint": Use(f"{endpoint}"),
        "get endpt-logs": Use(f"{endpoint}"),
        "get endpt-workers": Use(f"{endpoint}"),
        "show workergroups": Use(),
        "create workergroup": Use(f"--endpoint_id {endpoint} --template_hash {template}", endpoint_id=endpoint,
                                  template_hash=template),
        "update workergroup": Use(f"{group} --gpu_ram 24", group, gpu_ram=24),
        "delete workergroup": Use(f"{group}"),
        "get wrkgrp-logs": Use(f"{group} --tail 2", group, tail=2),
        "get wrkgrp-workers": Use(f"{group}"),
        "update workers": Use(f"{group}"),
        "route": Use("my-endpoint 242", "my-endpoint", 242),
        "request": Use("my-endpoint /v1/completions --json '{\"prompt\": \"Hi\"}'", "my-endpoint", "/v1/completions",
                       {"prompt": "Hi"}, json=True),
        "show notification-types": Use(),
        "show notifications": Use(before=lambda sdk, market: sdk.set_notifications(preferences)),
        "set notifications": Use(f"'{json.dumps(preferences)}'", preferences),
        "show webhooks": Use(before=webhook),
        "create webhook": Use("https://example.com/hook client:low_credit client:outbid", "https://example.com/hook",
                              ["client:low_credit", "client:outbid"]),
        "update webhook": Use(f"{new + 1} --name pager", new + 1, name="pager", before=webhook),
        "delete webhook": Use(f"{new + 1}", before=webhook),
        "rotate webhook-secret": Use(f"{new + 1}", before=webhook),
        "test webhook": Use(f"{new + 1}", before=webhook),
        "self-test machine": Use("7 --no-support-bundle", 7, no_support_bundle=True, exit=1),
        "dump-logs": Use(f"7 --output-dir {folder}", 7, output_dir=folder, same=ANY),
        "run benchmarks": Use(f"--template_id {template_id} --gpus RTX_4090 --no-cache -y", template_id=template_id,
                              gpus="RTX_4090", no_cache=True),
        "help": Use("show instances", same=ANY),
        "repl": Use(stdin=f"show instance {running}\nlabel instance {running} 'my own'\n\nexit\n", same=ANY),
        "completion": Use("bash", same=ANY),
        "update": Use("", exit=1),
        "uninstall": Use("-y", exit=1),
    }


ELSEWHERE = {"run"}  # these have tests of their own, as they need a machine to talk to


class EveryCommandTest(CommandCase):
    """Each row of the table, called as a method, with --raw and plainly, against a service in the same state."""

    def setUp(self):
        super().setUp()
        self.called = self.fake_programs("ssh", "scp", "rsync", "ssh-keygen")
        self.born = int(time.time())
        self.fresh()
        self.uses = uses(self.fresh(), self.home)

    def fresh(self):
        """A fresh service; its clock moves on a second each time it is looked at, so all times are the same again."""
        clock = itertools.count(self.born)
        with self.box.lock:
            self.box.market = Market("sandbox-5f0c2a9be1d74386", 25.0, 1.0, lambda: float(next(clock)))
            self.box.market.url = self.box.url
        return self.box.market

    def use_of(self, name):
        if name not in self.uses:
            self.skipTest(f"no use of `{name}` yet")  # told by the next test
        return self.uses[name]

    def ready(self, use):
        market = self.fresh()
        if use.before:
            use.before(self.client, market)

    def test_every_command_has_a_use(self):
        self.assertEqual(set(vastai.COMMANDS) - set(self.uses) - ELSEWHERE, set(), "commands without an entry in uses(): add one")
        self.assertEqual(set(self.uses) - set(vastai.COMMANDS), set(), "entries in uses() without a command")

    def test_every_command(self):
        for name, row in vastai.COMMANDS.items():
            if name in ELSEWHERE:
                continue
            with self.subTest(name):
                self.check_command(row, self.use_of(name))

    def test_what_asks_sends_nothing_without_a_yes(self):
        for name, row in vastai.COMMANDS.items():
            use = self.uses.get(name)
            if use and not use.exit and (row.ask or row.asks) and row.ask_when != "terminal":
                with self.subTest(name):
                    self.ready(use)
                    before = len(self.box.requests)
                    status, _, err = self.run_here(f"{name} {use.line.replace(' -y', '')}")
                    self.assertEqual((status, "not confirmed" in err), (2, True), err)
                    sent = [request["method"] for request in self.box.requests[before:]]
                    self.assertLessEqual(set(sent), {"GET", "POST"} if row.ask_when == "within" else set())

    def test_every_list_in_every_format(self):
        for name, row in vastai.COMMANDS.items():
            if row.is_list and row.face != "sdk":
                with self.subTest(name):
                    use, printed = self.use_of(name), {}
                    for option in (*(f"--format {form}" for form in vastai.WRITERS), "-q"):
                        self.ready(use)
                        printed[option] = self.ok(f"{option} {name} {use.line}")
                    rows = [json.loads(line) for line in printed["--format jsonl"].splitlines()]
                    fields = [field for _, field, form, *_ in row.columns if form not in vastai.ROW_FORMATS]
                    for field in fields:
                        there = [vastai.has_path(item, part) for item in rows for part in field.split("|")]
                        self.assertTrue(any(there), f"a column of the field {field!r}, which no row has")
                    for form, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
                        found = list(csv.DictReader(io.StringIO(printed["--format " + form]), dialect=dialect))
                        self.assertEqual([sorted(row) for row in found], [sorted(set().union(*rows))] * len(rows))
                    if row.columns and "quiet" not in [arg.name for arg in row.args]:
                        self.assertEqual(len(printed["-q"].splitlines()), len(rows))

    def test_a_format_of_any_kind_gets_rows_and_columns(self):
        def write(listing):
            return "".join(f"{column[0]}: {vastai.format_cell(column, row)}\n" for row in listing.chosen for column in listing.columns)

        with mock.patch.dict(vastai.WRITERS, tsv=write):
            self.assertRegex(self.ok("show ssh-keys --format tsv"), r"\AID: \d+\n(.*\n)*Key: ssh-ed25519 ")
            self.assertRegex(self.ok("show ssh-keys --format tsv --fields id"), r"\Aid: \d+\n\Z")

    def test_nonsense_from_the_service_is_an_error(self):
        local = ("set api-key", "set role", "tfa logout", "dump-logs", "help", "repl", "completion")
        hollow = {name: [{}] for row in vastai.COMMANDS.values()
                  for name in (row.member, row.is_list and row.returns[:-2]) if name}
        hollow = json.dumps({**hollow, "clusters": {"1": None}, "secrets": {"A": None}, "invoices": [{}]})
        for answer in ("null", '"text"', "{}", "[7]", "<html>", '{"success": false, "msg": "no"}', hollow):
            self.box.failures.clear()
            self.box.fail(".*", 200, answer, times=10 ** 9)
            for name, row in vastai.COMMANDS.items():
                if row.face != "sdk" and name not in ELSEWHERE | {"run benchmarks"}:  # which looks for long for what it made
                    with self.subTest(name, answer=answer):
                        waiting = " --max-wait 0" * ("max_wait" in [arg.name for arg in row.args])
                        use = self.use_of(name)
                        status, out, err = self.run_here(f"{name} {use.line}{waiting}", stdin=use.stdin)
                        self.assertNotRegex(out + err, "Traceback|defect of this program")
                        if name not in local and answer not in ('"text"', "{}", hollow):
                            self.assertNotEqual(status, 0, out)

    def test_a_benchmark_gives_everything_back(self):
        market = self.fresh()
        before = {name: list(market.tables[name]) for name in ("instances", "endpoints", "workergroups")}
        template = next(iter(market.tables["templates"]))
        row, = self.client.run_benchmarks(template_id=template, gpus="RTX_4090", no_cache=True)
        self.assertEqual((row["status"], row["measured_perf"]), ("ok", 152.3))
        self.assertAlmostEqual(row["perf_per_dollar"], row["measured_perf"] / row["rental_dph"])
        self.assertEqual({name: list(market.tables[name]) for name in before}, before)
        methods = [call["method"] for call in self.box.requests if call["path"].startswith("/api/v0/endptjobs/")]
        self.assertEqual([method for method in methods if method != "GET"], ["POST", "DELETE"])

    def check_command(self, row, use):
        result = ANY
        if row.face != "cli":
            self.ready(use)
            result = getattr(self.client, row.methods[0])(*use.args, **use.given)
            self.check_shape(row, result, use.exit)
        if row.face == "sdk":
            return
        self.ready(use)
        status, out, err = self.run_here(f"{row.name} --raw {use.line}", stdin=use.stdin)
        self.assertEqual(status, use.exit, err)
        self.assertNotIn("Traceback", err)
        if use.exit:
            self.assertTrue(json.loads(err)["error"])
        if result is not ANY:
            printed = out.rstrip("\n") if row.returns == "text" and not row.text else json.loads(out or "null")
            if use.same is not ANY:
                self.assertEqual(timeless(printed), timeless((use.same or (lambda same: same))(result)))
        self.ready(use)
        status, out, err = self.run_here(f"{row.name} {use.line}", stdin=use.stdin)
        self.assertEqual(status, use.exit, err)
        self.assertReadable(re.sub("^Started. {.*}\n", "", out) + err, row.name)
        if use.exit:
            self.assertIn(row.name, err)
        elif result is not ANY:
            self.assertTrue(out.strip(), "a reader gets something to read")
        self.assertEqual(out.startswith(("{", "[")), use.json, "a reader gets JSON: `done` or `columns` lack what they name")

    def check_shape(self, row, result, exit):
        if row.is_list:
            self.assertIsInstance(result, list)
            self.assertTrue(result, "nothing was found: the use of this command tests nothing")
            self.assertTrue(all(isinstance(item, dict) for item in result))
        elif row.returns == "none":
            self.assertIsNone(result)
        elif row.returns == "text":
            self.assertIsInstance(result, str)
        else:
            self.assertIsInstance(result, (dict, list) if row.returns == "any" else dict)
            if isinstance(result, dict):
                self.assertEqual(result.get("success") is False, bool(exit), result)
        for column in ("made", "member", "gaps", "status"):
            name = getattr(row, column)
            if name and isinstance(result, dict) and not row.schedule:
                self.assertTrue(vastai.has_path(result, name), f"{column}={name!r}, which the result does not have: {result}")


class DescriptionTest(CommandCase):
    """What only the public description of the service has: members of bodies, and forms of answers."""

    def body(self, line):
        """The body that a line would send, from the line for curl that it prints."""
        words = shlex.split(self.ok(line + " --curl"))
        found = [word for word in words if word.startswith("{")]
        return json.loads(found[0]) if found else words

    def test_members(self):
        for line, members in (
                ("create instance 7 --image i", {"runtype": "ssh"}),
                ("create instance 7 --image i --vm --target_state stopped", {"vm": True, "target_state": "stopped"}),
                ("create instance 7 --image i --args_str 'a b'", {"args_str": "a b", "runtype": "args"}),
                ("create workergroup --endpoint_id 7 --test_workers 5 --min_load 1.5",
                 {"test_workers": 5, "min_load": 1.5}),
                ("update workergroup 7 --target_util .8", {"target_util": .8}),
                ("get endpt-logs --endpoint chat", {"endpoint": "chat"}),
                ("schedule maint 7 --sdate 2030-03-16T01:20:00Z --duration 2 -y", {"sdate": 1899854400}),
                ("schedule maint 7 --sdate '2030-03-16 01:20' --duration 2 -y", {"sdate": 1899854400}),
                ("schedule maint 7 --sdate 1899854400.5 --duration 2 -y", {"sdate": 1899854400.5})):
            with self.subTest(line):
                body = self.body(line)
                self.assertEqual({name: body.get(name) for name in members}, members)
        self.assertFalse({"vm", "target_state", "args_str"} & set(self.body("create instance 7 --image i")))

    def test_what_only_the_answer_knows_is_said(self):
        for line, rule, answer, said in (
                ("cleanup machine 7", "PUT .*", {"success": True, "num_deleted": 5}, "machine 7; contracts deleted: 5."),
                ("list machine 7 -g 0.5 -e 2035-01-02", "PUT .*", {"success": True},
                 "price_gpu $0.50/hr, min_chunk 1, end_date 2035-01-02 00:00 UTC."),
                ("set defjob 7 --image i --args a -b", "PUT .*", {"success": True}, "args a -b."),
                ("schedule maint 7 --sdate 2035-01-02 --duration 1 -y", "PUT .*", {"success": True}, "UTC for 1 h."),
                ("join cluster 12 7", "PUT .*", {"success": True}, "Added machine 7 to cluster 12."),
                ("wait instance 7 --status exited --max-wait 0", "GET .*", {"instances": {"id": 7, "actual_status": "running"}},
                 "Keep waiting with `vastai wait instance 7 --status exited`"),
                ("create cluster 10.0.0.0/24 7", "POST .*", {"success": True, "msg": "Cluster 14 created"}, "Cluster 14"),
                ("show earnings", "GET .*", {"per_day": [], "per_machine": [{"machine_id": 7, "gpu_earn": 1.5, "sto_earn": .25}]},
                 "Machine 7: $1.75")):
            with self.subTest(line):
                self.box.fail(rule, 200, answer)
                status, out, err = self.run_here(line)
                self.assertEqual(status, 9 if "wait" in line else 0, err)
                self.assertIn(said, out + err)
        answer = {"success": True, "new_contract": 9, "note": "x" * 5000}
        self.box.fail("PUT .*", 200, answer)
        self.assertEqual(ast.literal_eval(self.ok("create instance 7 --image i").partition("Started. ")[2]), answer)

    def test_what_is_not_there(self):
        for line, status, said in (
                ("create instance 9 --image i", 4, "see `vastai search offers`"), ("reboot instance 9", 4, "see `vastai show instances`"),
                ("list volume 9", 4, "see `vastai show machines`"), ("clone volume 8 9", 4, "No such volume 8\n"),
                ("stop instance 8 9", 2, "for several, use `vastai stop instances`\n"), ("show instance 8 9", 2, "unexpected '9'\n"),
                ("start deployment 9", 4, "see `vastai show deployments`"), ("join overlay x 9", 4, "see `vastai show overlays`"),
                ("help show foo", 2, "no command 'show foo'"), ("show foo --help", 2, "no command 'show foo'"),
                ("show user --fields id,foo", 0, "\nfoo  -\n"), ("show user --fields foo", 0, "foo  -\n")):
            with self.subTest(line):
                got, out, err = self.run_here(line)
                self.assertEqual(got, status, err)
                self.assertIn(said, out + err)

    def test_ids_alone(self):
        """--quiet prints ids or nothing, and what is shown only once on stderr."""
        codes = {"success": True, "backup_codes": ["AAAA-1"]}
        for line, answer, out, told in (
                ("list machines 1 2 -g 1", {"success": True}, "", ""), ("list volume 1", {"success": True, "id": 9}, "9\n", ""),
                ("show invoices-v1 -i", {"results": [{"metadata": {"invoice_id": 9}, "source": "x"}]}, "9\n", ""),
                ("show invoices-v1 -c", {"results": [{"source": "instance-9"}]}, "instance-9\n", ""),
                ("create api-key --name x", {"id": 9, "key": "K1"}, "9\n", "K1"), ("reset api-key", {"new_api_key": "K2"}, "", "K2"),
                ("tfa send-email", {"success": True, "secret": "S1"}, "", "S1"),
                ("tfa regen-codes -c 1 -y", codes, "Backup codes for Vast.ai; each works once. All earlier codes are void.\nAAAA-1\n", "3:"),
                ("tfa activate 1 --secret s", {"success": True}, "", "")):
            with self.subTest(line):
                self.box.fail(".*", 200, answer, times=2)
                got = self.run_here(line + " -q", stdin="3\ny\n")
                self.box.failures.clear()
                self.assertEqual((got[0], got[1]), (0, out), got[2])
                self.assertIn(told, got[2])

    def test_fields_that_leave_out_the_only_copy(self):
        """What must not be lost is on stderr if no field that was asked for is in the answer."""
        for line, answer in (("reset api-key", {"new_api_key": "K2"}), ("create instance 7 --image i", {"success": True, "new_contract": 9}),
                             ("tfa regen-codes -c 1 -y", {"success": True, "backup_codes": ["AAAA-1"]})):
            for form in ("table", "csv"):
                with self.subTest(line, form=form):
                    self.box.fail(".*", 200, answer)
                    status, out, err = self.run_here(f"{line} --fields id --format {form}")
                    self.assertEqual((status, str(answer) in err), (0, True), out + err)

    def test_wrong_use(self):
        for line in ("get endpt-logs", "get endpt-logs 7 --endpoint chat", "show earnings --last_days 3 -s 2026-01-01",
                     "schedule maint 7 --sdate soon --duration 2 -y", "schedule maint 7 --sdate=-5 --duration 2 -y",
                     "schedule maint 7 --sdate 2026-02-30 --duration 2 -y",
                     "create instance 7 --image i --target_state asleep", "route chat"):
            with self.subTest(line):
                self.assertEqual(self.run_here(line)[0], 2)
        self.assertEqual(self.box.requests, [])

    def test_earnings(self):
        self.client.show_earnings(last_days=3, user_id=456)
        seen = self.last(".*/machine-earnings")
        self.assertEqual((seen["path"], seen["query"]),
                         ("/api/v0/users/456/machine-earnings", {"owner": "me", "last_days": 3}))

    def test_members_of_the_sdk(self):
        self.client.create_api_key("k", key_params={"ip_whitelist": ["192.0.2.1"]})
        self.assertEqual(self.last(".*/apikeys/")["body"]["key_params"], {"ip_whitelist": ["192.0.2.1"]})
        self.client.create_template(name="n", image="i", docker_login_user="u", docker_login_pass="p", args_str="a")
        self.assertLessEqual({"docker_login_user": "u", "docker_login_pass": "p", "args_str": "a"}.items(),
                             self.last(".*/template/")["body"].items())


def timeless(value):
    """An answer without the members that say how long ago something was, which the client works out."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name != "duration"}
    return [timeless(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- searching, renting and destroying


class RentalTest(CommandCase):
    """What people come for, as the first examples of the documentation have it."""

    def test_the_first_program(self):
        client = vastai.VastAI(api_key="your-api-key")
        offers = client.search_offers(limit=10)
        self.assertEqual(len(offers), 10)
        result = client.create_instance(id=offers[0]["id"], image="pytorch/pytorch:latest")
        self.assertTrue(result.get("success"))
        instances = client.show_instances()
        self.assertIn(result["new_contract"], [inst["id"] for inst in instances])
        self.assertIn("created", [inst["actual_status"] for inst in instances])
        self.assertEqual(self.box.requests[0]["headers"].get("Authorization"), "Bearer your-api-key")
        sent = self.last("/api/v0/asks/.*")["body"]
        self.assertEqual((sent["image"], sent["client_id"], sent["env"]), ("pytorch/pytorch:latest", "me", {}))

    def test_what_is_not_there(self):
        self.assertIsNone(self.client.show_instance(id=99999))
        with self.assertRaises(Exception) as caught:
            self.client.destroy_instance(id=99999)
        self.assertRegex(f"Error: {caught.exception}",
                         r"(?s)^Error: destroy instance: HTTP 404: .*99999.*show instances")
        for line in ("show instance 99999", "show instance 99999 --raw"):
            status, out, err = self.run_here(line)
            self.assertEqual((status, out), (4, ""))
            self.assertIn("99999", err)

    def test_a_search_filters_orders_and_limits(self):
        found = self.client.search_offers(query="num_gpus >= 4 gpu_ram >= 24 dph_total < 2.0", order="dph_total")
        self.assertTrue(found)
        self.assertTrue(all(row["num_gpus"] >= 4 and row["gpu_ram"] >= 24000 and row["dph_total"] < 2 for row in found))
        prices = [row["dph_total"] for row in found]
        self.assertEqual(prices, sorted(prices))
        self.assertEqual(self.last("/api/v0/bundles/")["body"], {
            "verified": {"eq": True}, "external": {"eq": False}, "rentable": {"eq": True}, "num_gpus": {"gte": "4"},
            "gpu_ram": {"gte": 24000.0}, "dph_total": {"lt": "2.0"}, "order": [["dph_total", "asc"]],
            "type": "on-demand", "allocated_storage": 5.0})
        found = self.client.search_offers(query='geolocation in ["US", "CA"]')
        self.assertEqual({row["geolocation"][-2:] for row in found}, {"US", "CA"})
        found = self.client.search_offers(query="verified=any", order="dph_total-,id", limit=3)
        self.assertEqual(len(found), 3)
        self.assertEqual([row["id"] for row in found],
                         [row["id"] for row in sorted(found, key=lambda row: -row["dph_total"])])
        self.assertEqual([row["datacenter"] for row in found], [row["hosting_type"] == 1 for row in found])
        self.assertEqual(self.client.search_offers("num_gpus=99"), [])
        usual = len(self.client.search_offers())
        self.assertGreater(len(self.client.search_offers(query="verified=any rentable=any")), usual)
        self.assertGreater(len(self.client.search_offers(no_default=True)), usual)
        bids = {row["id"]: row["dph_total"] for row in self.client.search_offers(type="interruptible")}
        self.assertTrue(all(bids[row["id"]] < row["dph_total"] for row in self.client.search_offers()))
        self.assertEqual(self.ok("search offers num_gpus=99").count("\n"), 1)

    def test_a_rental_from_beginning_to_end(self):
        id = self.rented(disk=32, label="mine", env={"A": "1"}, ssh=True, direct=True)
        self.assertEqual(self.client.show_instance(id=id)["label"], "mine")
        self.assertEqual(self.client.show_instance(id=id)["extra_env"], {"A": "1"})
        self.assertIs(self.client.stop_instance(id=id)["success"], True)
        self.assertEqual(self.client.show_instance(id)["actual_status"], "exited")
        self.assertIs(self.client.start_instance(id=id)["success"], True)
        self.assertEqual(self.client.wait_instance(id, poll=0.1)["actual_status"], "running")
        self.assertIs(self.client.reboot_instance(id=id)["success"], True)
        self.assertIn(self.client.show_instance(id)["actual_status"], ("created", "loading"))
        self.client.label_instance(id, "")
        self.assertEqual(self.client.show_instance(id)["label"], "")
        self.assertIs(self.client.destroy_instance(id=id)["success"], True)
        self.assertIsNone(self.client.show_instance(id))
        self.assertNotIn(id, [row["id"] for row in self.client.show_instances()])

    def test_waiting(self):
        with fast_clock():
            id = self.raw(f"create instance {self.cheapest()} --image a/b --wait --max-wait 20")["instance"]["id"]
            self.assertEqual(self.client.show_instance(id)["actual_status"], "running")
            self.box.market.boot = 1000
            self.client.stop_instance(id)
            self.client.start_instance(id)
            status, out, err = self.run_here(f"wait instance {id} --max-wait 0.2 --poll 0.1")
            self.assertEqual((status, out), (9, ""))
            self.assertIn(f"wait instance {id}", err)
            self.client.stop_instance(id)
            status, _, err = self.run_here(f"wait instance {id} --poll 0.1 --max-wait 3")
            self.assertEqual(status, 1, "a stopped instance never runs: waiting has no sense")
            self.assertIn("exited", err)
            self.assertEqual(self.client.wait_instance(id, status="exited")["actual_status"], "exited")
            self.ok(f"destroy instance {id} -y --wait")
            self.assertEqual(self.client.wait_instance(id, status="destroyed"), {"id": id, "actual_status": "destroyed"})
            status, out, err = self.run_here(f"wait instance {id} --max-wait 0.5")
            self.assertEqual((status, out, "unknown to the service" in err), (9, "", True), "right after a rental that is normal")
            status, out, err = self.run_here("wait instance 7 --max-wait 0.5 --url http://127.0.0.1:9")
            self.assertEqual((status, out, "after 0.5 s: cannot reach http://127.0.0.1:9" in err), (9, "", True), err)

    def test_what_was_rented_is_said_with_its_price(self):
        offer = self.cheapest("gpu_name=RTX_4090 num_gpus=1")
        with fast_clock():
            status, _, err = self.run_here(f"create instance {offer} --image a/b --wait")
        self.assertEqual(status, 0, err)
        self.assertRegex(err, rf"Instance \d+ is running: 1x RTX_4090 in .+, offer {offer}, \$0\.\d+/hr\. Open a shell with")

    def test_logs_are_followed_to_the_end(self):
        id = next(iter(self.box.market.tables["instances"]))
        with subprocess.Popen([sys.executable, compiled(), "logs", str(id), "-f", "--tail", "3"],
                              env=self.environment, stdout=subprocess.PIPE, encoding="utf-8") as process:
            watch = threading.Timer(20, process.kill)
            watch.start()
            seen = [process.stdout.readline() for _ in range(3)]
            instance = self.box.market.tables["instances"][id]
            instance.container_log = lambda now: [*map(str.rstrip, seen[1:]), "over"]
            self.client.stop_instance(id)
            rest = process.stdout.read()
            watch.cancel()
        self.assertRegex("".join(seen), r"(?s)step .*step .*step ")
        self.assertEqual((process.returncode, rest), (0, "over\n"), "what it wrote last is not lost")
        text = self.client.logs(id, tail="2")
        self.assertEqual(len(text.splitlines()), 2)
        self.assertNotIn("Authorization", self.last("/storage/.*")["headers"])
        os.environ["VAST_API_KEY"] = self.box.market.key = "5ecret-k3y"
        instance.container_log = lambda now: ["the key is 5ecret-k3y", "password=hush"]
        bundle = self.raw(f"dump-logs 7 --instance-id {id} --output-dir {self.home}")
        with tarfile.open(bundle["path"]) as archive:
            texts = {name: archive.extractfile(name).read().decode() for name in archive.getnames()}
        self.assertEqual(sorted(texts), bundle["files"])
        self.assertIn("docker pull", texts["instance/daemon.log"])
        for secret in ("5ecret-k3y", "hush", instance.row["jupyter_token"]):
            self.assertNotIn(secret, "".join(texts.values()))

    def test_refusals_are_said_in_the_services_words(self):
        offer = self.cheapest()
        for credit, expected in ((0.001, "lacks credit"), (25.0, "not available")):
            self.box.market.user["credit"] = credit
            if credit > 1:
                self.client.create_instance(offer, image="vastai/pytorch")
            with self.subTest(expected):
                with self.assertRaises(vastai.VastAIError) as caught:
                    self.client.create_instance(offer, image="vastai/pytorch")
                self.assertIn(expected, str(caught.exception))
                status, out, err = self.run_here(f"create instance {offer} --image vastai/pytorch --raw")
                self.assertEqual((status, out), (4 if credit > 1 else 1, ""))
                self.assertIn(expected, json.loads(err)["msg"])
                self.assertEqual(json.loads(err)["status_code"], caught.exception.status)
        self.assertNotIn("shows what there is", self.run_here(f"create instance {offer} --image vastai/pytorch")[2])
        status, _, err = self.run_here(f"create instance {offer} --image x --bid_price -1")
        self.assertEqual(status, 2)
        self.assertIn("--bid_price", err)

    def test_a_rate_limit_is_waited_for(self):
        self.box.fail("POST /api/v0/bundles/", 429, "API requests too frequent: endpoint threshold=0.1", times=2)
        self.assertTrue(self.client.search_offers(limit=1))
        self.box.fail("POST /api/v0/bundles/", 429, {"msg": "slow down"}, {"Retry-After": "0"}, times=3)
        with self.assertRaises(vastai.RateLimitError) as caught:
            self.client.search_offers(limit=1)
        self.assertEqual((caught.exception.status, caught.exception.exit_status), (429, 5))
        self.assertIn("429", str(caught.exception))

    def test_many_pages_are_one_list(self):
        for offer in [row["id"] for row in self.client.search_offers(query="num_gpus<=2", limit=26)]:
            self.box.market.user["credit"] = 100
            self.client.create_instance(offer, image="vastai/pytorch")
        everything = self.client.show_instances()
        self.assertEqual([row["id"] for row in everything], sorted(self.box.market.tables["instances"]))
        self.assertGreater(len(everything), 25)
        page = self.raw("show instances --limit 5")
        self.assertEqual(len(page["instances"]), 5)
        second = self.raw(f"show instances -l 5 -t {page['next_token']}")["instances"]
        self.assertEqual(second[0]["id"], everything[5]["id"])
        self.assertEqual(len(self.client.show_instances(status=["exited"])), 1)

    def test_where_the_key_comes_from(self):
        xdg = os.path.join(self.home, "xdg")
        places = {"tfa": os.path.join(xdg, "vastai", "vast_tfa_key"),
                  "file": os.path.join(xdg, "vastai", "vast_api_key"), "old": os.path.join(self.home, ".vast_api_key")}
        os.makedirs(os.path.dirname(places["file"]))

        def used(line="show user", **environment):
            self.run_here(line, XDG_CONFIG_HOME=xdg, **environment)
            return self.box.requests[-1]["headers"].get("Authorization", "none").split()[-1]
        for path in places.values():
            with open(path, "w") as file:
                file.write(" \n")  # blank counts as absent
        before = len(self.box.requests)
        status, out, err = self.run_here("show user", XDG_CONFIG_HOME=xdg, VAST_API_KEY=" ")
        self.assertEqual((status, out, len(self.box.requests)), (3, "", before))
        for words in (places["file"], "VAST_API_KEY", "~/.vast_api_key", "--api-key"):
            self.assertIn(words, err)
        self.assertEqual(used("search offers", VAST_API_KEY=""), "none")
        for name in ("old", "file", "tfa"):  # each goes before those that were there
            with open(places[name], "w") as file:
                file.write(f"key-{name}\n")
            self.assertEqual(used(VAST_API_KEY=""), f"key-{name}")
        self.assertEqual(used(VAST_API_KEY="key-env"), "key-env")
        self.assertEqual(used("show user --api-key key-code", VAST_API_KEY="key-env"), "key-code")
        self.assertEqual(used("show user --api-key ''", VAST_API_KEY="key-env"), "key-env")
        with mock.patch.dict(os.environ, XDG_CONFIG_HOME=xdg, VAST_API_KEY=""):
            client = vastai.VastAI()
            self.assertEqual((client.api_key, client.creds_source), ("key-file", "FILE"))
        self.assertEqual([client.creds_source for client in (vastai.VastAI("k"), self.client, vastai.VastAI(" "))],
                         ["CODE", "ENV", "ENV"])
        for key, source in (("other", "VAST_API_KEY"), ("", places["tfa"])):
            err = self.run_here("set api-key fresh-key", XDG_CONFIG_HOME=xdg, VAST_API_KEY=key)[2]
            self.assertIn(f"{source} takes precedence over the file", err)
        os.unlink(places["tfa"])
        err = self.run_here("set api-key fresh-key", XDG_CONFIG_HOME=xdg, VAST_API_KEY="")[2]
        self.assertEqual(err, "")
        with open(places["file"]) as file:
            self.assertEqual(file.read(), "fresh-key")
        self.assertFalse(os.path.exists(places["old"]))
        if os.name == "posix":
            self.assertEqual(os.stat(places["file"]).st_mode & 0o777, 0o600)

    def test_explain_shows_all_but_the_key(self):
        key = "k3y-that-nobody-sees"
        err = io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()) as out:
            vastai.VastAI(api_key=key, explain=True).search_offers(limit=1)
        self.assertIn(f"POST {self.box.url}/api/v0/bundles/", err.getvalue())
        self.assertIn('"limit": 1', err.getvalue())
        self.assertEqual(out.getvalue(), "")
        status, out, err = self.run_here("create instance 7 --image x --env '-e TOKEN=t0p' --login hush --explain "
                                         f"--api-key {key}")
        self.assertEqual(status, 4)
        for secret in (key, "t0p", "hush"):
            self.assertNotIn(secret, out + err)

    def test_the_curl_line_does_the_same(self):
        for line in ("show user", "search offers 'gpu_name=RTX_4090 num_gpus=1' --limit 2",
                     "label instance {instances} \"it's $HOME\"", "create instance 7 --image x",
                     "get endpt-logs {endpoints}"):
            with self.subTest(line):
                line = line.format(**{name: next(iter(rows)) for name, rows in self.box.market.tables.items() if rows})
                status, printed, err = self.run_here(line + " --curl")
                self.assertEqual((status, err, self.box.key in printed), (0, "", False))
                if not shutil.which("curl"):
                    continue
                done = subprocess.run(["sh", "-c", printed.replace("curl", "curl -s", 1)], env=self.environment,
                                      stdout=subprocess.PIPE)
                theirs = self.box.requests[-1]
                self.run_here(line + " --raw")
                ours = self.box.requests[-1]
                self.assertEqual([theirs[part] for part in ("method", "path", "query", "body")],
                                 [ours[part] for part in ("method", "path", "query", "body")])
                self.assertEqual(theirs["headers"].get("Authorization"), ours["headers"].get("Authorization"))
                self.assertIsInstance(json.loads(done.stdout), dict)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            self.assertIsNone(self.client.show_user(curl=True))
        self.assertTrue(out.getvalue().startswith("curl -X GET "))

    def test_formats_and_fields(self):
        line = "search offers gpu_name=RTX_4090 -o dph --limit 2 --fields id,gpu_name,search.gpuCostPerHour"
        rows = self.raw(line)
        self.assertEqual([sorted(row) for row in rows], [["gpu_name", "id", "search.gpuCostPerHour"]] * 2)
        self.assertEqual([json.loads(text) for text in self.ok(line + " --format jsonl").splitlines()], rows)
        for form, dialect in (("csv", "excel"), ("tsv", "excel-tab")):
            found = list(csv.reader(io.StringIO(self.ok(f"{line} --format {form}")), dialect))
            self.assertEqual(found, [["id", "gpu_name", "search.gpuCostPerHour"]] + [
                [str(row[name]) for name in ("id", "gpu_name", "search.gpuCostPerHour")] for row in rows])
        self.assertEqual([text.split()[0] for text in self.ok(line).splitlines()],
                         ["id", *(str(row["id"]) for row in rows)])
        self.assertEqual(self.raw(line), json.loads(self.ok(line + " --format json")))
        self.assertEqual(self.ok("show instances -q"), "".join(f"{id}\n" for id in self.box.market.tables["instances"]))
        id = next(iter(self.box.market.tables["instances"]))
        self.assertEqual(self.raw(f"show instance {id} --fields id,label"), {"id": id, "label": "training"})
        self.assertEqual(self.run_here("show instances --format xml")[0], 2)

    def test_tables_in_a_pipe(self):
        running, stopped = self.box.market.rows("instances")
        running.row.update(label="日本語 e\u0301", image_uuid="\033[31mred\r\n\u202e\u2028x")
        whole = stopped.view
        stopped.view = lambda now, boot: dict(whole(now, boot), label=None, dph_total=None, image_uuid=None)
        status, text, err = self.run_process("show instances")
        self.assertEqual(status, 0, err)
        self.assertReadable(text)
        lines = text.splitlines()
        self.assertEqual(len(lines), 3)
        self.assertIn(r"\x1b[31mred\r\n\u202e\u2028x", text)
        self.assertNotIn("None", text)
        self.assertEqual(lines[2].split()[0], str(stopped.id))
        self.assertRegex(lines[2], r"  -  .*  -  ")
        column = lines[0].index("GPU")
        wide = lines[1][:lines[1].index("1x")]
        self.assertEqual(vastai.display_width(wide), column)
        self.assertEqual(lines[2][column:column + 2], "1x")
        status, out, err = self.run_process("show instances", env={**self.environment, "PYTHONIOENCODING": "ascii"})
        self.assertEqual(status, 0, err)
        self.assertIn(r"\u65e5", out)

    def test_ssh_to_a_stopped_instance_says_how_to_start_it(self):
        id = self.rented()
        self.client.wait_instance(id, poll=0.1)
        self.client.stop_instance(id)
        self.client.wait_instance(id, status="exited", poll=0.1)
        for words in (f"ssh {id} ls", f"scp {id}:/x ."):
            status, _, err = self.run_here(words)
            self.assertEqual((status, f"vastai start instance {id} --wait" in err), (1, True), err)

    def test_what_ssh_scp_and_rsync_are_told(self):
        id = self.rented(ssh=True, direct=True)
        self.client.wait_instance(id, poll=0.1)
        instance, port = self.box.market.tables["instances"][id], urllib.parse.urlsplit(self.box.url).port
        instance.offer["public_ipaddr"] = "127.0.0.1"
        instance.ports = lambda: {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]}
        called = self.fake_programs("ssh", "scp", "rsync")
        options = ["-o", "StrictHostKeyChecking=accept-new", "-o", f"HostKeyAlias=vastai-{id}"]
        self.ok(f"ssh -i key {id} ls -l '/a b' --help --raw -i x")
        self.assertEqual(called(), ["ssh", "-p", str(port), *options, "-i", "key", "root@127.0.0.1", "ls", "-l",
                                    "/a b", "--help", "--raw", "-i", "x"])
        self.ok(f"--retry 2 ssh --timeout=9 {id} -L 8080:localhost:8080 -N")
        self.assertEqual(called()[-4:], ["root@127.0.0.1", "-L", "8080:localhost:8080", "-N"])
        self.ok(f"scp -r data {id}:/workspace/")
        self.assertEqual(called(), ["scp", "-P", str(port), *options, "-r", "--", "data", "root@127.0.0.1:/workspace/"])
        self.ok(f"copy local:{self.home}/ C.{id}:/workspace/data --exclude '*.tmp' -i key")
        words = called()
        self.assertRegex(words[words.index("-e") + 1], r"^ssh -i key -p \d+ -o StrictHostKeyChecking=no$")
        self.assertEqual(words[0], "rsync")
        self.assertIn("--exclude=*.tmp", words)
        self.assertEqual(words[-2:], [f"{self.home}/", f"vastai_kaalia@127.0.0.1::C.{id}//workspace/data"])
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.home)
        os.makedirs("run_10:00/x")
        for line, at in ((f"scp run_10:00/x {id}:/y", -2), (f"copy run_10:00/x {id}:/y", -2), (f"copy {id}:/y run_10:00/x", -1)):
            self.ok(line)
            self.assertEqual(called()[at], "./run_10:00/x", "no program reads it as a host")
        self.assertEqual(self.run_here(f"ssh {id}", FAKE_STATUS="7")[0], 7, "the status of the remote command")
        self.assertEqual(self.run_here(f"ssh {id}", PATH=os.path.join(self.home, "nowhere"))[0], 127)
        os.unlink(os.path.join(self.home, "called"))
        self.assertEqual([self.run_here(f"scp -- -x {id}:/a")[0], self.run_here("scp a b")[0]], [2, 2])
        instance.offer["public_ipaddr"] = instance.row["ssh_host"] = "-oProxyCommand=x"
        for line in (f"ssh {id}", f"scp {id}:/a .", f"copy {id}:/a local:{self.home}/x"):
            self.assertNotEqual(self.run_here(line)[0], 0, line)
        self.assertFalse(os.path.exists(os.path.join(self.home, "called")), "nothing was run")

    def test_questions(self):
        id, line = self.rented(), "destroy instance {}"
        for answer in ("", "n\n", "yeah\n", "\n"):
            status, out, err = self.run_here(line.format(id), stdin=answer)
            self.assertEqual((status, out), (2, ""))
            self.assertIn(f"Destroy instance {id}", err)
        self.assertIsNotNone(self.client.show_instance(id))
        for answer in ("y\n", "YES\nn\n"):
            self.ok(line.format(self.rented()), stdin=answer)
        self.ok(line.format(id) + " --yes")

    def test_several_instances_at_once(self):
        ids = self.client.create_instances([row["id"] for row in self.client.search_offers("num_gpus=1", limit=3)],
                                           image="vastai/pytorch")["new_contracts"]
        self.ok(["stop", "instances", *ids])
        self.assertEqual({self.client.show_instance(id)["actual_status"] for id in ids}, {"exited"})
        self.ok(["destroy", "instances", *ids, "-y"])
        self.assertEqual([self.client.show_instance(id) for id in ids], [None] * 3)

    def test_scheduled_jobs_do_not_act_now(self):
        id = next(iter(self.box.market.tables["instances"]))
        self.ok(f"change bid {id} --price 0.5 --schedule DAILY --day '*' --hour 3")
        self.assertFalse([request for request in self.box.requests if "bid_price" in request["path"]])
        self.assertEqual(self.client.show_scheduled_jobs()[0]["hour_of_the_day"], 3)
        self.box.fail("POST /api/v0/commands/schedule_job/", 200, {"success": True})
        self.assertEqual(json.loads(self.ok(f"reboot instance {id} --schedule WEEKLY")), {"success": True})
        again = f"change bid {id} --price 0.6 --schedule DAILY --day '*' --hour 3"
        self.box.fail("POST /api/v0/commands/schedule_job/", 422, {"success": False, "scheduled_job_id": 1}, times=2)
        self.assertEqual(self.run_here(again, stdin="n\n")[0], 2)
        self.run_here(again + " --yes")
        self.assertEqual(self.box.requests[-1]["method"], "PUT", "the question says that --yes skips it")
        status, _, err = self.run_here(f"reboot instance {id} --schedule DAILY --hour 25")
        self.assertEqual(status, 2)
        self.assertIn("--hour", err)

    def test_the_program_in_a_process_of_its_own(self):
        status, out, err = self.run_process("show user --raw")
        self.assertEqual((status, json.loads(out)["username"], err), (0, "ada", ""))
        self.assertNotIn(self.box.key, out)
        script = "show user\nshow instance 99999\nshwo user\n\n# remark\nshow instances -q\nexit\nshow user\n"
        status, out, err = self.run_process("repl", input=script)
        self.assertEqual(out.splitlines()[-2:], [str(id) for id in self.box.market.tables["instances"]])
        self.assertEqual((out.count("ada@example.com"), "99999" in err, "show user" in err), (1, True, True))
        self.assertNotEqual(status, 0, "a script tells whether all of it went well")
        done = subprocess.run([sys.executable, "-m", "vastai", "--version"], cwd=HERE, stdout=subprocess.PIPE)
        self.assertEqual((done.returncode, done.stdout.decode().strip()), (0, vastai.__version__))
        status, out, err = self.run_process("shwo instances")
        self.assertEqual((status, out), (2, ""))
        self.assertIn("did you mean 'show instances'", err)

    def test_the_process_ends_with_the_program(self):
        """Nothing is tidied up behind it, unless VASTAI_DEBUG asks for it; what was printed has gone out."""
        code = "import atexit, vastai; atexit.register(print, 'tidy'); print('first'); vastai.program()"
        for debug, last in (("", []), ("1", ["tidy"])):
            done = subprocess.run([sys.executable, "-c", code, "--version"], cwd=HERE, stdout=subprocess.PIPE,
                                  env={**os.environ, "VASTAI_DEBUG": debug})
            self.assertEqual((done.returncode, done.stdout.decode().split()), (0, ["first", vastai.__version__, *last]))


# --------------------------------------------------------------------------------- hosts: self-test


class SelfTestTest(CommandCase):
    """`self-test machine`: it waits for what it rented, follows its page, and leaves nothing behind."""

    box_options = {"boot": 30}

    def setUp(self):
        super().setUp()
        self.box.offer(machine_id=5)
        self.before = set(self.box.market.tables["instances"])

    def outcome(self, *pages, page=True, code=None, **machine):
        """The result of a self-test on a machine that behaves like that, and whose page shows these texts in turn."""
        steps = [step if callable(step) else reply(step) for step in pages] or [hang_up]
        with Faulty(*steps, tls=server_context(self.home)) as host:
            address = ("127.0.0.1", host.port if page else 9)
            self.box.machine(5, **{**BEHAVIOR, "address": address, **machine})
            with fast_clock():
                result = self.client.self_test_machine(5, support_bundle_dir=self.home)
        self.assertEqual((result["failure_code"], result["success"]), (code, code is None), result["reason"])
        return result

    def test_a_good_machine(self):
        result = self.outcome("Starting\n", "Starting\nGPU burn: ok\n", "Starting\nGPU burn: ok\nDONE\n")
        self.assertEqual(result["phase"], "complete")
        self.assertFalse(result["diagnostics"])
        self.assertEqual(set(self.box.market.tables["instances"]), self.before)
        rental = self.last("/api/v0/asks/.*")["body"]
        self.assertIn("-p 5000:5000", rental["env"])
        self.assertEqual(rental["label"], "vast-self-test-machine-5")

    def test_on_the_command_line(self):
        for page, expected in (("DONE\n", 0), ("ERROR: NCCL\n", 1)):
            with Faulty(reply("GPU burn: ok\n"), reply("GPU burn: ok\n" + page), tls=server_context(self.home)) as host:
                self.box.machine(5, address=("127.0.0.1", host.port))
                with fast_clock():
                    status, out, err = self.run_here("self-test machine 5 --no-support-bundle --debugging --raw")
            self.assertEqual(status, expected, err)
            self.assertIs(json.loads(out)["success"], not expected)
            self.assertIn("GPU burn: ok", err)
            self.assertRegex(err, r"(?m)^Renting offer \d+ of machine 5 at \$[0-9.]+/hr$")
            self.assertEqual(set(self.box.market.tables["instances"]), self.before)

    def test_what_does_not_start(self):
        for code, machine in (("docker_pull_failed", {"starts": False, "message": "Error: manifest unknown"}),
                              ("daemon_startup_failed", {"status": "exited", "message": "oci runtime create failed"}),
                              ("instance_offline_before_test", {"status": "offline"}),
                              ("daemon_startup_failed", {"status": "created", "outbid": 0}),
                              ("instance_start_timeout", {"starts": False})):
            with self.subTest(code, **machine):
                result = self.outcome(code=code, **machine)
                self.assertEqual((result["phase"], result["stage"]), ("wait", "startup"))
                self.assertEqual(set(self.box.market.tables["instances"]), self.before)

    def test_what_fails_while_it_runs(self):
        for code, pages, machine in (
                ("nccl_failed", ["Starting\n", "Starting\nERROR: NCCL allreduce failed\n"], {}),
                ("stress_gpu_burn_failed", ["ERROR: gpu-burn found faults\n"], {}),
                ("legacy_progress_error", ["ERROR: something else\n"], {}),
                ("progress_empty_timeout", [""], {}),
                ("progress_endpoint_unreachable", [], {"page": False}),
                ("progress_endpoint_lost", ["Starting\n", hang_up], {}),
                ("progress_port_not_mapped", [], {"differs": {"ports": {"22/tcp": []}}}),
                ("missing_public_ip", [], {"differs": {"public_ipaddr": None}})):
            with self.subTest(code):
                result = self.outcome(*pages, code=code, **machine)
                self.assertEqual(result["phase"], "test")
                self.assertEqual(set(self.box.market.tables["instances"]), self.before)

    def test_odd_offers_and_ports(self):
        for ports in (["x"], "x", {"5000/tcp": {"x": 1}}, {"5000/tcp": ["x"]}, {"5000/tcp": 5}):
            self.outcome(code="progress_port_not_mapped", differs={"ports": ports})
        self.outcome(code="instance_start_timeout", differs={"intended_status": {}})
        offer = next(row for row in self.box.market.rows("offers") if row["machine_id"] == 5)
        for name, value in (("gpu_total_ram", "x"), ("num_gpus", "2"), ("num_gpus", "x")):
            offer[name] = value
            self.outcome(code="progress_port_not_mapped", differs={"ports": []})
        self.assertEqual(set(self.box.market.tables["instances"]), self.before)

    def test_a_page_that_does_not_end(self):
        """What came of it counts."""
        def lines(faulty, sock, request):
            sock.sendall(reply("Starting\nDONE\n", Content_Length=99))
            faulty.over.wait(5)  # longer than anybody waits for more
        with mock.patch.object(vastai, "PAGE_WAIT", 2.0):
            self.outcome(lines)
        self.assertEqual(set(self.box.market.tables["instances"]), self.before)

    def test_a_page_that_goes_on_for_ever(self):
        lines = itertools.count()
        result = self.outcome(lambda faulty, sock, request: sock.sendall(reply(f"line {next(lines)}\n")),
                              code="runtime_test_timeout")
        self.assertIn("600 s", result["reason"])

    def test_a_failure_is_written_down(self):
        result = self.outcome("Starting\n", "Starting\nERROR: NVML went away\n", code="nvml_failed")
        bundle = result["diagnostics"]["support_bundle"]
        self.assertEqual(os.path.dirname(bundle["path"]), self.home)
        with tarfile.open(bundle["path"]) as archive:
            self.assertIn("instance/container.log", archive.getnames())
            log = archive.extractfile("self-test-output.log").read().decode()
            everything = b"".join(archive.extractfile(name).read() for name in archive.getnames())
        self.assertIn("ERROR: NVML went away", log)
        self.assertNotIn(self.box.key.encode(), everything)

    def test_what_is_denied_is_removed(self):
        """Once is not enough to forget what was seen."""
        for method in ("DELETE", "GET"):
            def page(faulty, sock, request, method=method):
                sock.sendall(reply("DONE\n"))
                self.box.fail(method + " /api/v0/instances/.*", 404)
            self.outcome(page)
            self.assertEqual(set(self.box.market.tables["instances"]), self.before)

    def test_what_cannot_be_removed_is_said(self):
        self.box.fail("DELETE /api/v0/instances/.*", times=99)
        with self.assertRaises(vastai.PartialError) as caught:
            self.outcome("DONE\n")
        left, = set(self.box.market.tables["instances"]) - self.before
        price = self.client.show_instance(left)["dph_total"]
        self.assertIn(f"is billed {vastai.format_rate(price)} until `vastai destroy instance {left}`", str(caught.exception))

    def test_refused_but_made(self):
        """It is destroyed, and nobody is told that it is billed."""
        self.box.fail("PUT /api/v0/asks/.*", 400, {"success": False, "msg": "no", "new_contract": 7})
        reason = self.outcome(code="instance_create_failed")["reason"]
        self.assertEqual(reason.partition("; ")[2], "it created instance 7 anyway, which was destroyed")
        self.assertEqual(self.last("/api/v0/instances/7/")["method"], "GET")
        self.assertIs(self.last("/api/v0/asks/.*")["body"]["cancel_unavail"], False)

    def test_a_lost_answer(self):
        """Other tests of the machine stay: the one that has come since is removed, or nothing; also if the service's
        clock is behind.
        """
        for age in (1800, 1200):
            id = self.client.create_instance(self.box.offer()["id"], image="a/b",
                                             label="vast-self-test-machine-5")["new_contract"]
            self.box.instance(id, differs={"start_date": time.time() - age})
            self.before.add(id)
        self.box.fail("PUT /api/v0/asks/.*", None)
        self.box.fail("GET /api/v1/instances/", 200, {"instances": [{"id": id, "label": "vast-self-test-machine-5"}]})
        with self.assertRaisesRegex(vastai.PartialError, f"when {id} started is unknown"):
            self.outcome()
        self.assertEqual(set(self.box.market.tables["instances"]), self.before)
        for prepare in (self.box.fail, self.box.lose):
            for status, behind in ((None, 0), (500, 0), (503, 0), (None, 300)):
                self.box.market.now = lambda behind=behind: time.time() - behind
                prepare("PUT /api/v0/asks/.*", status)
                self.outcome(code="instance_create_failed" if status else "instance_create_missing_contract")
                self.assertEqual(set(self.box.market.tables["instances"]), self.before)


# ------------------------------------------------------ benchmarks, charges, copies, second factors


class KnownBenchmarksTest(CommandCase):
    """`run benchmarks` rents nothing if others have measured lately."""

    box_options = {"boot": 5}

    def setUp(self):
        super().setUp()
        market = self.box.market
        self.template, other = market.rows("templates")[:2]
        market.tables["benchmarks"].clear()
        for value, price, age, more in ((100, 0.2, 1, {}), (300, 0.4, 29, {}), (900, 9.0, 31, {}), (0, 0.3, 1, {}),
                                        (950, 9.0, 1, {"num_gpus": 2}), (970, 9.0, 1, {"gpu_name": "H200"}),
                                        (990, 9.0, 1, {"template_id": other["id"], "template_hash": other["hash_id"]})):
            market.add("benchmarks", {
                "machine_id": 5, "gpu_name": "RTX 4090", "type": "perf", "num_gpus": 1, "value": value,
                "dph_base": price, "template_hash": self.template["hash_id"], "template_id": self.template["id"],
                "last_update": market.born - age * DAY, **more})

    def writes(self):
        rented = ("/api/v0/endptjobs", "/api/v0/autojobs")
        return [call for call in self.box.requests if call["path"].startswith(rented)]

    def test_the_median_of_thirty_days(self):
        for given in ({"template_id": self.template["id"]}, {"template_hash": self.template["hash_id"]}):
            row, = self.client.run_benchmarks(gpus="RTX_4090", **given)
            self.assertEqual((row["status"], row["measured_perf"]), ("cached", 200))
            self.assertAlmostEqual(row["rental_dph"], 0.3)
            self.assertAlmostEqual(row["perf_per_dollar"], 200 / 0.3)
        self.assertEqual(self.writes(), [])

    def test_odd_measurements_and_conditions(self):
        for row, value, price in zip(self.box.market.rows("benchmarks"), ("100", "x", None), ("0.2", [], {})):
            row.update(value=value, dph_base=price, id=[7])
        self.template["extra_filters"] = "null"
        row, = self.client.run_benchmarks(gpus="RTX_4090", template_id=self.template["id"])
        self.assertEqual((row["status"], row["measured_perf"], row["rental_dph"]), ("cached", 100, 0.2))
        for limits, count in (({"gte": "24000"}, 1), ({"gt": None}, 1), (5, 1), ({"gt": "50000"}, 4), ({"gt": 1e300}, 8)):
            self.assertIn(("RTX 4090", count), vastai.gpu_specs("", None, {"gpu_total_ram": limits}))
        self.assertEqual(vastai.gpu_specs("2x rtx_3060__LAPTOP, titan v,my_gpu", 4, {}),
                         [("RTX 3060 laptop", 2), ("Titan V", 4), ("my gpu", 4)])

    def test_a_person_may_measure_again(self):
        line = f"run benchmarks --template_id {self.template['id']} --gpus RTX_4090"
        self.assertIn("cached", self.ok(line, stdin="n\n"))
        self.assertEqual(self.writes(), [])
        with fast_clock():
            self.assertNotIn("cached", self.ok(line, stdin="y\ny\n"))
        self.assertTrue(self.writes())

    def test_the_question_names_the_price(self):
        line = f"run benchmarks --template_id {self.template['id']} --gpus RTX_4090 --no-cache"
        status, _, err = self.run_here(line, stdin="n\n")
        self.assertEqual((status, self.writes()), (2, []))
        self.assertRegex(err, r"Rent 1x RTX 4090 for up to 30 minutes, at about \$0\.\d+/hr together\?")
        self.box.fail("POST /api/v0/bundles/", 200, json.dumps({"offers": [{"id": 1}]}))
        self.assertIn("at an unknown price together?", self.run_here(line, stdin="n\n")[2])

    def test_without_offers_what_is_known_is_enough(self):
        self.box.market.tables["offers"] = {
            id: row for id, row in self.box.market.tables["offers"].items() if row["gpu_name"] != "RTX 4090"}
        row, = self.client.run_benchmarks(template_id=self.template["id"], gpus="RTX_4090")
        self.assertEqual(row["status"], "cached")
        row, = self.client.run_benchmarks(template_id=self.template["id"], gpus="RTX_4090", no_cache=True)
        self.assertEqual(row["status"], "skipped")

    def test_why_a_template_has_no_offer(self):
        line = f"run benchmarks --template_id {self.template['id']} --gpus RTX_4090 --no-cache"
        search = self.box.market.offers_for
        for filters, told in (({"reliability": {"gt": 2}}, "the template asks for reliability"),
                              ({"reliability": 5}, "the template asks for reliability"),
                              ({"reliability": {"gt": 0}, "disk_space": {"gt": 0}}, "no offer of it meets all filters")):
            self.template["extra_filters"] = json.dumps(filters)
            self.box.market.offers_for = lambda body, filters=filters: [] if body.keys() >= filters.keys() else search(body)
            with self.subTest(filters):
                self.assertIn(told, self.run_here(line)[2])


class ChargesTest(CommandCase):
    """Charges of endpoints as a tree: endpoint, workergroup, instance."""

    def test_items_of_a_label(self):
        """What has no id that can be used belongs to no instance."""
        items = [{"amount": nth, "timestamp": time.time() - 9, "instance_id": id} for nth, id in enumerate(([], {}, None, 7, 8), 1)]
        self.box.fail("GET /api/v0/users/me/invoices", 200, {"invoices": items})
        self.box.fail("POST /api/v0/contracts/fetch/", 200, {"success": True, "contracts": [{"id": []}, {}, {"id": 7}]})
        self.assertEqual([row["amount"] for row in self.raw("show invoices --instance_label x")], [4])

    def test_a_tree(self):
        lines = self.ok("show invoices-v1 --charges --format tree --limit 100", stdin="n\n").splitlines()
        endpoint, group = (next(iter(self.box.market.tables[name])) for name in ("endpoints", "workergroups"))
        at = next(nth for nth, line in enumerate(lines) if re.match(f"endpoint +{endpoint} ", line))
        self.assertRegex(lines[at + 1], f"^  workergroup +{group} ")
        self.assertRegex(lines[at + 2], r"^    instance +\d+ ")
        self.assertTrue(any(re.match(r"instance +\d+ ", line) for line in lines), "others stand beside it")
        self.assertEqual(self.last("/api/v0/charges/")["query"]["format"], "tree")

    def test_a_tree_for_programs(self):
        answer = self.client.show_invoices_v1(charges=True, format="tree", limit=100)
        wrapper, = [row for row in answer["results"] if row["type"] == "serverless"]
        below = [row for group in wrapper["items"] for row in group["items"]]
        self.assertAlmostEqual(wrapper["amount"], sum(row["amount"] for row in below), 2)
        plain = self.client.show_invoices_v1(charges=True, limit=100)["results"]
        self.assertAlmostEqual(sum(row["amount"] for row in plain), sum(row["amount"] for row in answer["results"]), 2)


class CostTest(CommandCase):
    """`cost`: each thing that costs, the sum, and what may be forgotten."""

    box_options = {"boot": 0.0, "credit": 10.0}

    def setUp(self):
        super().setUp()
        self.market = self.box.market
        self.market.tables["instances"].clear()
        self.market.tables["charges"].clear()

    def instance(self, **differs):
        """The id of an instance that costs $0.30/hr, of it $0.02 for its disk; members of its row differ."""
        offer = self.box.offer()
        id = self.client.create_instance(id=offer["id"], image="i")["new_contract"]
        prices = {"dph_total": 0.3, "storage_total_cost": 0.02, "label": "mine"}
        self.box.instance(id, differs={**prices, **differs})
        return id

    def line_of(self, id, kind="instance"):
        line, = [row for row in self.client.cost()["rows"] if (row["kind"], row["id"]) == (kind, id)]
        self.assertEqual(set(line), {"kind", "id", "label", "state", "hour", "later", "why"})
        return tuple(line[name] for name in ("hour", "later", "why"))

    def test_each_state(self):
        old = time.time() - 2 * DAY
        for differs, line in (
                ({"actual_status": "running"}, (0.3, None, None)),
                ({"actual_status": "running", "label": None}, (0.3, None, None)),
                ({"actual_status": "running", "label": None, "gpu_util": 0.0},
                 (0.3, None, "running, no label, GPU at 0 % now")),
                ({"actual_status": "running", "gpu_util": 0.0}, (0.3, None, None)),
                ({"actual_status": "loading"}, (0.02, 0.3, None)),
                ({"actual_status": "created"}, (0.02, 0.3, None)),
                ({"actual_status": None}, (0.02, 0.3, None)),
                ({"actual_status": "created", "intended_status": "stopped"}, (0.02, None, None)),
                ({"actual_status": "exited", "intended_status": "stopped"}, (0.02, None, None)),
                ({"actual_status": "stopped", "start_date": old}, (0.02, None, "stopped for over a day")),
                ({"actual_status": "offline"}, (0.0, None, "offline"))):
            with self.subTest(**differs):
                self.assertEqual(self.line_of(self.instance(**differs)), line)

    def test_what_was_never_started(self):
        """As a low bid leaves it."""
        for intended in ("stopped", "running"):
            id = self.instance(actual_status=None, intended_status=intended)
            row, = [row for row in self.client.cost()["rows"] if row["id"] == id]
            self.assertEqual(row["state"], "stopped" if intended == "stopped" else "created")

    def test_instances_without_an_id(self):
        for _ in range(2):
            self.instance(id=None, actual_status="running")
        self.assertEqual(self.client.cost()["hour"], 0.6)

    def test_what_ran_yesterday_is_not_forgotten_yet(self):
        id = self.instance(actual_status="exited", start_date=time.time() - 2 * DAY)
        self.market.add("charges", {"id": 1, **vast_charge(f"instance-{id}")})
        self.assertEqual(self.line_of(id)[2], None)
        self.assertEqual(self.client.cost()["last_day"], {"gpu": 4.0, "disk": 1.0, "traffic": 0.75, "total": 5.75})

    def test_volumes(self):
        self.client.create_volume(next(iter(self.market.tables["volume_offers"])), size=72)
        volume, = self.market.rows("volumes")
        price = volume["storage_total_cost"]
        self.assertEqual(self.line_of(volume["id"], "volume"), (price, None, "volume on nothing"))
        volume["instances"].append(7)
        self.assertEqual(self.line_of(volume["id"], "volume"), (price, None, None))
        volume.update(status="deleted", storage_total_cost=None)
        cost = self.client.cost()
        self.assertEqual(([row["kind"] for row in cost["rows"]], cost["unknown"]), (["endpoint"], []))

    def test_workers_count_once(self):
        endpoint = next(iter(self.market.tables["endpoints"]))
        for id, state in zip(self.box.workers(endpoint, 3), ("running", "running", "loading")):
            self.box.instance(id, differs={"dph_total": 0.3, "storage_total_cost": 0.02, "actual_status": state})
        own = self.instance()
        cost = self.client.cost()
        self.assertEqual([(row["kind"], row["id"]) for row in cost["rows"]], [("instance", own), ("endpoint", endpoint)])
        self.assertAlmostEqual(cost["rows"][1]["hour"], 0.62)
        self.assertAlmostEqual(cost["rows"][1]["later"], 0.9)
        self.assertAlmostEqual(cost["hour"], 0.92)

    def test_the_sum(self):
        self.instance(), self.instance(actual_status="exited")
        self.market.user.update(credit=6.4, balance_threshold=10.0)
        cost = self.client.cost()
        self.assertAlmostEqual(cost["hour"], 0.32)
        self.assertAlmostEqual(cost["day"], 0.32 * 24)
        self.assertAlmostEqual(cost["month"], 0.32 * 720)
        self.assertAlmostEqual(cost["hours_left"], 20, 2)
        end = vastai.seconds_of(cost["runs_out"])
        self.assertAlmostEqual(end, time.time() + 20 * HOUR, delta=60)
        self.assertEqual(cost["unknown"], [])
        status, out, err = self.run_here("cost")
        self.assertEqual((status, len(out.splitlines())), (0, 4))
        self.assertRegex(err, r"^\$0\.32/hr, \$7\.68/day, \$230\.40/month; credit \$6\.40 lasts (20h 0m|19h 59m), until .* UTC\n")
        self.assertIn("below your alert threshold of $10.00", err)
        self.assertIn("2 of 2 instances, $0.3200/hr", self.run_here("show instances")[2])

    def test_nothing_costs(self):
        self.market.tables["endpoints"].clear()
        cost = self.client.cost()
        self.assertEqual((cost["hour"], cost["hours_left"], cost["runs_out"], cost["rows"]), (0, None, None, []))
        self.assertIn("Nothing is billed now", self.run_here("cost")[2])

    def test_what_cannot_be_read_is_unknown(self):
        self.instance()
        for path, name in (("GET /api/v0/volumes.*", "volumes"), ("GET /api/v0/users/current.*", "user"),
                           ("GET /api/v0/charges/", "charges"), ("GET /api/v1/instances/", "instances"),
                           ("GET /api/v0/endptjobs/", "endpoints"), ("POST /get_endpoint_workers/", "workers of")):
            with self.subTest(name):
                self.box.failures.clear()
                self.box.fail(path, 403, '{"success": false, "msg": "not for this key"}', times=9)
                unknown, = self.client.cost()["unknown"]
                self.assertTrue(unknown.startswith(name))
                status, out, err = self.run_here("cost")
                self.assertEqual(status, 8)
                self.assertRegex(err, "(?i)at least \\$0")
                self.assertIn(f"{unknown}: not for this key", err.replace("(HTTP 403)", "").replace("  ", " "))
                status, out, err = self.run_here("cost --raw")
                self.assertEqual((status, json.loads(out)["unknown"]), (8, [unknown]))

    def test_a_price_that_is_not_told(self):
        ids = [self.instance(dph_total=None), self.instance(dph_total="much"),
               self.instance(actual_status="exited", storage_total_cost=None, instance={})]
        self.assertEqual(self.client.cost()["unknown"], [f"instance {id}" for id in ids])
        self.assertEqual(self.run_here("cost")[0], 8)
        self.assertIn("3 instances, at least $0.0000/hr", self.run_here("show instances")[2])
        for price in (-5, 1e300):  # takes nothing off the others, and is no sum
            self.box.instance(ids[0], differs={"dph_total": price, "actual_status": "running"})
            self.box.instance(ids[1], differs={"dph_total": 0.3, "actual_status": "running"})
            cost = self.client.cost()
            self.assertEqual((cost["hour"], cost["unknown"]), (0.3, [f"instance {ids[0]}", f"instance {ids[2]}"]))

    def test_all_that_fails_is_a_failure(self):
        self.box.fail(".*", 401, '{"success": false, "msg": "Invalid user key"}', times=99)
        self.assertRaises(vastai.AuthError, self.client.cost)
        self.assertEqual(self.run_here("cost")[0], 3)

    def test_a_credit_for_ever(self):
        self.instance(dph_total=1e-9)
        self.market.user["credit"] = 1e9
        cost = self.client.cost()
        self.assertGreater(cost["hours_left"], 1e17)
        self.assertIsNone(cost["runs_out"])

    def test_curl_prints_all_and_sends_nothing(self):
        self.assertEqual(self.ok("cost --curl").count("curl "), 5)
        self.assertEqual(self.box.requests, [])

    def test_requests_that_do_not_depend_on_each_other_go_out_together(self):
        together = threading.Barrier(5)
        answers = {"/api/v0/users/current": {"credit": 1}, "/api/v1/instances/": {"instances": []},
                   "/api/v0/volumes": {"volumes": []}, "/api/v0/endptjobs/": {"results": []},
                   "/api/v0/charges/": {"results": []}}

        def route(request):
            together.wait(5)  # none is answered before all have come
            return reply(answers[request["path"]])

        with Faulty(route=route) as server, vastai.VastAI(KEY, server.url) as client:
            self.assertEqual(client.cost()["unknown"], [])

    def test_show_user_says_which_key(self):
        self.assertIn("from the environment variable VAST_API_KEY", self.run_here("show user")[2])
        self.assertEqual(len(self.box.requests), 1)
        self.assertNotIn(self.box.key, self.run_here("show user")[2])


class TestAtTheSameTime(FaultCase):
    """Requests of one command that do not need each other's answers are under way together."""

    def server(self, count, faults=()):
        """Answers the first change, of 4, at once, the others when `count` of them are there; refuses `faults`."""
        together = threading.Barrier(count)

        def route(request):
            if request["method"] == "GET":
                rows = [{"contract_id": id, "pending_price_increase_id": id * 10} for id in range(1, 5)]
                return reply({"success": True, "pending_price_increases": rows})
            name, = json.loads(request["body"]).keys() & {"machine", "pending_price_increase_id"}
            number = json.loads(request["body"])[name]
            if number not in (4, 40):
                together.wait(5)
            return reply({"success": number not in faults, "number": number, "msg": "no" * (number in faults)})

        return self.serve(route=route)

    def test_machines(self):
        client = self.client(self.server(3))
        self.assertEqual([row["number"] for row in client.list_machines([4, 2, 3, 1], price_gpu=1)], [4, 2, 3, 1])
        error = self.error(self.client(self.server(3, faults=[2])).list_machines, [4, 2, 3, 1], price_gpu=1)
        self.assertEqual([(row["id"], row["success"]) for row in error.results],
                         [(4, True), (2, False), (3, True), (1, True)])

    def test_a_key_that_is_refused_is_tried_once(self):
        server = self.serve(reply({"msg": "Invalid user key"}, 401))
        self.assertIsInstance(self.error(self.client(server).list_machines, [4, 2, 3], price_gpu=1), vastai.AuthError)
        self.assertEqual(len(server.requests), 1)

    def test_price_increases(self):
        done = self.run_here(self.server(3), "accept", "price-increase", "4", "2", "3", "1", "-y", "--raw")
        self.assertEqual([row["response"]["number"] for row in json.loads(done.stdout)["results"]], [40, 20, 30, 10])
        done = self.run_here(self.server(3, faults=[20]), "accept", "price-increase", "4", "2", "3", "1", "-y")
        self.assertEqual((done.returncode, "1 of 4 failed: 2" in done.stderr), (8, True))


class LabelTest(CommandCase):
    """On the command line an instance may be called by its label."""

    box_options = {"boot": 0.0}

    def setUp(self):
        super().setUp()
        self.id = self.rented(label="my run", wait=True)
        self.other = self.rented(label="other", wait=True)
        for _ in range(2):
            self.rented(label="twins", wait=True)
        self.box.requests.clear()

    def asked(self):
        """The requests, without the look-up of labels."""
        return [(seen["method"], seen["path"]) for seen in self.box.requests if seen["path"] != "/api/v1/instances/"]

    def test_each_place_where_an_instance_is_taken(self):
        self.fake_programs("ssh", "scp", "rsync")
        lines = {"show instance 'my run'": f"/api/v0/instances/{self.id}/", "logs 'my run' --max-wait 0.05": "request_logs",
                 "stop instance 'my run'": f"/{self.id}/", "change bid 'my run' --price 1": f"/bid_price/{self.id}/",
                 "take snapshot 'my run' --repo a/b": f"/take_snapshot/{self.id}/", "cancel copy 'my run'": "copy_direct",
                 "cloud copy --src a --instance 'my run' --connection 1001": "/rclone/",
                 "show instance-ssh-keys 'my run'": f"/{self.id}/ssh/", "destroy instance 'my run' -y": f"/{self.id}/"}
        for line, path in lines.items():
            with self.subTest(line):
                self.box.requests.clear()
                self.run_here(line)
                self.assertEqual(sum(seen["path"] == "/api/v1/instances/" for seen in self.box.requests), 1)
                self.assertIn(path, self.asked()[0][1])

    def test_several_at_once(self):
        for line in ("'my run' other", "'my run,other'", f"{self.id} other", f"'my run' {self.other}"):
            self.ok(f"stop instances {line}")
            self.assertEqual(self.last("/api/v0/instances/")["body"]["ids"], [self.id, self.other], line)
        self.assertEqual(sum(seen["method"] == "GET" for seen in self.box.requests), 4)

    def test_places(self):
        called = self.fake_programs("scp", "rsync", "ssh")
        self.ok("ssh 'my run' ls -la")
        self.assertEqual(called()[-2:], ["ls", "-la"])
        self.ok("scp 'my run:/workspace/a b' .")
        self.assertRegex("\n".join(called()), r"root@ssh\d\.vast\.ai:/workspace/a b")
        self.ok("copy 'my run:/workspace/x' other:/y")
        body = self.last("/api/v0/commands/copy_direct/")["body"]
        self.assertEqual((body["src_id"], body["dst_id"], body["src_path"]), (str(self.id), str(self.other), "/workspace/x"))
        self.box.requests.clear()
        self.run_here(f"copy s3.101:/data {self.id}:/data")
        self.run_here(f"copy drive:/data {self.id}:/data")
        self.assertNotIn("/api/v1/instances/", [seen["path"] for seen in self.box.requests])

    def test_a_label_may_begin_with_a_digit(self):
        for label in ("4090-train", "7 b"):
            self.client.label_instance(self.id, label)
            self.assertEqual(self.raw(f"show instance '{label}'")["id"], self.id)

    def test_digits_are_an_id(self):
        self.client.label_instance(self.id, "123")
        self.assertEqual(self.run_here("show instance 123")[0], 4)
        self.client.label_instance(self.id, "12x")
        self.box.requests.clear()
        status, out, err = self.run_here("destroy instance 12x -y")
        self.assertEqual((status, out, "'12x'" in err, "write 12" in err, self.box.requests), (2, "", True, False, []))

    def test_none_and_several(self):
        status, out, err = self.run_here("destroy instance gone -y")
        self.assertEqual((status, out, self.asked()), (4, "", []))
        self.assertIn("no instance labeled 'gone'; see `vastai show instances`", err)
        status, out, err = self.run_here("destroy instance twins -y --raw")
        self.assertEqual((status, out, self.asked()), (2, "", []))
        self.assertRegex(json.loads(err)["msg"], r"2 instances are labeled 'twins': \d+, \d+; give the id")

    def test_wrong_use_is_told_first(self):
        for line in ("change bid 'my run' --price x", "stop instance ''", "show instance -- -5", "show instance 'my run' --curl"):
            self.assertEqual(self.run_here(line)[0], 2, line)
        self.assertEqual(self.box.requests, [])
        self.assertRaises(vastai.UsageError, self.client.show_instance, "my run")


class ProfileTest(CommandCase):
    """Keys of several accounts."""

    def setUp(self):
        super().setUp()
        del os.environ["VAST_API_KEY"]
        self.folder = os.path.join(self.home, ".config", "vastai")

    def setting(self, name, key):
        self.ok(f"set api-key {key} --profile {name}")

    def test_each_has_its_file(self):
        self.ok("set api-key key-of-nobody")
        self.assertIn("vast_api_key.work", self.ok("set api-key key-of-work --profile work"))
        self.ok("set api-key key-of-home", VAST_PROFILE="home_2")
        self.assertEqual(sorted(os.listdir(self.folder)), ["vast_api_key", "vast_api_key.home_2", "vast_api_key.work"])
        self.assertEqual(os.stat(os.path.join(self.folder, "vast_api_key.work")).st_mode & 0o777, 0o600)
        for options, environment, key in (("", {}, "nobody"), ("--profile work", {}, "work"),
                                          ("", {"VAST_PROFILE": "home_2"}, "home"),
                                          ("--profile work", {"VAST_PROFILE": "home_2"}, "work"),
                                          ("--profile gone", {"VAST_API_KEY": "key-of-env"}, "env"),
                                          ("--profile gone --api-key key-of-code", {}, "code")):
            with self.subTest(options, **environment):
                err = self.run_here(f"show user {options} --explain", **environment)[2]
                self.assertIn({"nobody": "/vast_api_key\n", "work": "vast_api_key.work", "home": "vast_api_key.home_2",
                               "env": "variable VAST_API_KEY", "code": "--api-key"}[key], err)

    def test_programs(self):
        self.setting("work", "key-of-work")
        with mock.patch.dict(os.environ, VAST_PROFILE="work"):
            self.assertEqual(vastai.VastAI(server_url=self.box.url).api_key, "key-of-work")
            self.assertEqual(vastai.VastAI("mine", server_url=self.box.url).api_key, "mine")

    def test_a_profile_without_a_file_is_not_another_account(self):
        self.ok("set api-key key-of-nobody")
        with open(os.path.join(self.home, ".vast_api_key"), "w") as file:
            file.write("key-of-old")
        for line in ("show user --profile work", "search offers --profile work"):
            status, out, err = self.run_here(line)
            self.assertEqual((status, out), (3, ""))
            self.assertIn("vastai set api-key --profile work", err)
        with mock.patch.dict(os.environ, VAST_PROFILE="work"), vastai.VastAI(server_url=self.box.url) as client:
            self.assertRaises(vastai.AuthError, client.show_user)
        self.assertEqual(self.box.requests, [])

    def test_names(self):
        for name in ("a b", "../x", "x.y", "é", "a/b"):
            self.assertEqual(self.run_here(["show", "user", "--profile", name])[0], 2, name)
            self.assertEqual(self.run_here("show user", VAST_PROFILE=name)[0], 2, name)
        self.assertEqual(self.box.requests, [])

    def test_session_and_role(self):
        self.setting("work", "key-of-work")
        self.ok("tfa login -c 123456 -t totp --profile work")
        self.ok("set role client --profile work")
        self.assertEqual(sorted(os.listdir(self.folder)), ["vast_api_key.work", "vast_role.work", "vast_tfa_key.work"])
        self.assertIn("vast_tfa_key.work", self.run_here("show user --profile work")[2])
        self.assertNotIn("list machine", self.ok("--help --profile work"))
        self.assertNotIn("list machine", self.ok("help --profile work"))
        self.assertIn("list machine", self.ok("--help"))
        self.ok("tfa logout --profile work")
        self.assertNotIn("vast_tfa_key.work", os.listdir(self.folder))

    def test_a_session_that_is_over(self):
        self.setting("work", "key-of-work")
        vastai.write_private(os.path.join(self.folder, "vast_tfa_key.work"), "revoked-session")
        self.ok("show user --profile work")
        self.assertEqual(os.listdir(self.folder), ["vast_api_key.work"])

    def test_the_prompt_keeps_it(self):
        self.setting("work", "key-of-work")
        status, out, err = self.run_here("repl --profile work", stdin="show user\n")
        self.assertEqual((status, "vast_api_key.work" in err, "ada@example.com" in out), (0, True, True))


class TestWatch(FaultCase):
    """`watch`: one JSON line for each change, in a pipe."""

    def watch(self, looks, *words, wait=None, url=None):
        """Runs a line against answers that come one after the other, the last again and again; its events."""
        def answer(look):
            return look if isinstance(look, bytes) or callable(look) else reply(look)

        self.server = self.serve(*map(answer, looks))
        wait = str(60 * (len(looks) - 1)) if wait is None else wait
        with fast_clock():
            done = self.run_here(url or self.server, "watch", *words, "--interval", "60", "--max-wait", wait)
        self.events = [json.loads(line) for line in done.stdout.splitlines()]
        return done

    def told(self):
        return [(event["event"], event["id"]) for event in self.events]

    @staticmethod
    def offers(*rows):
        """An answer with offers of (id, machine, price)."""
        return {"offers": [{"id": id, "machine_id": machine, "dph_total": price} for id, machine, price in rows]}

    @staticmethod
    def instances(*rows, **members):
        usual = {"actual_status": "running", "dph_total": 0.3, "disk_util": 0.5, **members}
        return {"instances": [{"id": nth, **usual, **row} for nth, row in enumerate(rows, 7)], "total_instances": 1}

    def test_offers(self):
        looks = [self.offers((1, 10, 0.3)), self.offers((1, 10, 0.3), (2, 20, 0.4)), self.offers((2, 20, 0.35)),
                 self.offers(), self.offers((3, 10, 0.3))]
        done = self.watch(looks, "offers", "num_gpus=1")
        self.assertEqual(done.returncode, 9)
        self.assertEqual(self.told(), [("new", 1), ("new", 2), ("price", 2), ("gone", 1), ("gone", 2), ("new", 3)])
        self.assertEqual(self.events[2]["row"]["dph_total"], 0.35)
        self.assertEqual(set(self.events[0]), {"event", "id", "row"})
        body = json.loads(self.server.requests[0]["body"])
        self.assertEqual((body["order"], body["num_gpus"], body["verified"]),
                         ([["dph_total", "asc"]], {"eq": "1"}, {"eq": True}))

    def test_a_machine_counts_once(self):
        self.watch([self.offers((1, 10, 0.3), (2, 10, 0.6)), self.offers((2, 10, 0.6), (4, 10, 0.7))], "offers")
        self.assertEqual(self.told(), [("new", 1), ("price", 2)])

    def test_below(self):
        self.watch([self.offers((1, 10, 0.3), (2, 20, 0.5), (3, 30, None)), self.offers((2, 20, 0.39))], "offers",
                   "--below", "0.4")
        self.assertEqual(self.told(), [("new", 1), ("new", 2), ("gone", 1)])

    def test_once_and_exec(self):
        code = "import json, os, sys; json.dump([json.load(sys.stdin), dict(os.environ)], open('row', 'w')); print('x'); sys.exit(5)"
        with open(os.path.join(self.home, "it.py"), "w") as file:
            file.write(code.replace("'row'", repr(os.path.join(self.home, "row"))))
        command = f"{shlex.quote(sys.executable)} '{file.name}' '$HOME;ls'"
        with mock.patch.dict(os.environ, VAST_API_KEY=KEY, OTHER=KEY):
            done = self.watch([self.offers((1, 10, 0.3), (2, 20, 0.4))], "offers", "--once", "--exec", command, wait="60")
        self.assertEqual((done.returncode, self.told()), (5, [("new", 1)]))
        self.assertIn("exited with status 5", done.stderr)
        with open(os.path.join(self.home, "row")) as file:
            row, environment = json.load(file)
        self.assertEqual(row, self.offers((1, 10, 0.3))["offers"][0])
        self.assertEqual((environment["VAST_ID"], environment["VAST_PRICE"]), ("1", "0.3"))
        self.assertNotIn(KEY, environment.values())
        self.assertEqual(self.watch([self.offers(), self.offers((1, 10, 0.3))], "offers", "--once").returncode, 0)
        done = self.watch([self.offers((1, 1, 1))], "offers", "--once", "--exec", "no-such-program-here", wait="60")
        self.assertEqual((done.returncode, "cannot run no-such-program-here" in done.stderr), (127, True))

    def test_every_match_is_run_for(self):
        log = os.path.join(self.home, "log")
        self.watch([self.offers((1, 10, 0.3), (2, 20, 0.4)), self.offers((2, 20, 0.5), (3, 30, 0.6))], "offers",
                   "--exec", f"sh -c 'echo $VAST_ID >> {log}; exit $VAST_ID'")
        with open(log) as file:
            self.assertEqual(file.read().split(), ["1", "2", "3"])

    def test_instances(self):
        bid = {"is_bid": True, "dph_base": 0.2, "cur_state": "running", "next_state": "running", "intended_status": "running"}
        stopped = dict.fromkeys(("cur_state", "next_state", "intended_status"), "stopped")
        looks = [self.instances({}, bid), self.instances({}, bid),
                 self.instances({"actual_status": "exited"}, {**bid, **stopped, "actual_status": "exited"}),
                 self.instances({"actual_status": "exited", "disk_util": 0.95}, {**bid, **stopped, "actual_status": "exited"}),
                 self.instances({"actual_status": "exited", "disk_util": 0.97}, {"dph_total": 0.4, **stopped}, {}),
                 self.instances({"actual_status": "exited", "disk_util": -1})]
        done = self.watch(looks, "instances")
        self.assertEqual(self.told(), [("state", 7), ("outbid", 8), ("disk", 7), ("price", 8), ("state", 8), ("new", 9),
                                       ("gone", 8), ("gone", 9)])
        self.assertIn("is outbid or stopped; to raise the bid: `vastai change bid 8 --price 0.22`", done.stderr)
        self.assertEqual({request["path"] for request in self.server.requests}, {"/api/v1/instances/"})

    def test_instances_below_a_price(self):
        """What costs more later, or shows no price, is not gone."""
        looks = [self.instances({}, {"dph_total": 0.5}), self.instances({"dph_total": None}, {"dph_total": 0.5}),
                 self.instances({"dph_total": 0.45}, {"dph_total": 0.5}), self.instances({"id": 8, "dph_total": 0.5})]
        self.watch(looks, "instances", "--below", "0.4")
        self.assertEqual(self.told(), [("price", 7), ("gone", 7)])
        self.assertEqual(self.events[0]["row"]["dph_total"], 0.45)

    def test_once_for_instances_is_the_first_change(self):
        done = self.watch([self.instances({}), self.instances({}), self.instances({}, {}), {}], "instances", "--once")
        self.assertEqual((done.returncode, self.told(), len(self.server.requests)), (0, [("new", 8)], 3))

    def test_too_many_requests_double_the_pause(self):
        refused, moments, look = reply({}, 429), [], vastai.Monitor.look
        looks = [self.offers(), *[refused] * 4, self.offers()]
        with mock.patch.object(vastai.Monitor, "look", lambda monitor, left: (
                moments.append(time.monotonic()), look(monitor, left))[1]):
            self.watch(looks, "offers", wait="1200")
        pauses = [round((late - early) / 10) * 10 for early, late in zip(moments, moments[1:])]
        self.assertEqual(pauses[:6], [60, 120, 240, 300, 300, 60])

    def test_a_network_that_is_away_is_said_once(self):
        away = reply({}, 503)
        done = self.watch([self.offers((1, 1, 1)), away, hang_up, reply({}, 408), reply(b"<html>"), self.offers((1, 1, 1)),
                           self.offers()], "offers")
        self.assertEqual((self.told(), done.stderr.count("no answer, still trying"), done.stderr.count("answers again")),
                         ([("new", 1), ("gone", 1)], 1, 1), done.stderr)

    def test_what_ends_it(self):
        for status, code in ((401, 3), (403, 3), (400, 1), (404, 4)):
            self.assertEqual(self.watch([self.offers(), reply({"msg": "no"}, status)], "offers").returncode, code)
        for words in (["--interval", "5"], ["--exec", "'a"], ["--exec", ""], ["--below", "x"]):
            self.assertEqual(self.run_here(self.server, "watch", "instances", *words).returncode, 2)
            self.assertEqual(self.run_here(self.server, "watch", "offers", *words).returncode, 2)
        self.assertEqual(self.run_here(self.server, "watch", "offers", "num_gpus=many").returncode, 2)
        self.assertEqual(len(self.server.requests), 2)

    def test_signals_and_pipes(self):
        server = self.serve(reply(self.offers((1, 1, 1))))
        watch = ["watch", "offers", "--url", server.url, "--api-key", KEY]
        process = self.start_process(*watch)
        self.assertIn(b'"new"', process.stdout.readline())
        process.send_signal(signal.SIGINT)
        self.assertEqual((process.wait(60), process.stderr.read()), (130, b""))
        process.stdout.close()
        process.stderr.close()
        many = self.serve(reply(self.offers(*((n, n, 1) for n in range(5000)))))
        line = f"{shlex.quote(sys.executable)} {compiled()} watch offers --url {many.url} --max-wait 60 --api-key {KEY} | head -1"
        done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, timeout=20)
        self.assertEqual((done.stdout.count("\n"), done.stderr), (1, ""))

    def test_ids_alone(self):
        server = self.serve(reply(self.offers((1, 1, 1), (2, 2, 1))))
        self.assertEqual(self.run_here(server, "watch", "offers", "-q", "--max-wait", "0").stdout, "1\n2\n")

    def test_sparklines(self):
        self.assertEqual(vastai.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 0, 8), vastai.BLOCKS)
        self.assertEqual(vastai.sparkline([None, 3, "x", 4]), f" {vastai.BLOCKS[0]} {vastai.BLOCKS[7]}")
        self.assertEqual((vastai.sparkline([]), vastai.sparkline([5, 5])), ("", vastai.BLOCKS[0] * 2))
        self.assertEqual([vastai.format_use(share) for share in (None, -1, 0.5)], ["-", "-", f"{vastai.BLOCKS[4]} 50%"])
        self.assertEqual(vastai.level(float("inf")), vastai.BLOCKS[7])
        self.assertEqual(vastai.encodable(vastai.BLOCKS, io.TextIOWrapper(io.BytesIO(), "ascii")), ".:-=+*%#")


class JobPriceTest(CommandCase):
    """`search offers --hours --down --up`: what the whole job costs."""

    query = "gpu_name=RTX_4090 num_gpus=1"

    def setUp(self):
        super().setUp()
        for row in list(self.box.market.rows("offers")):
            row["rentable"] = False
        prices = {"dph_base": 0.36, "storage_cost": 0.0, "inet_down": 800.0, "inet_down_cost": 0.01, "inet_up_cost": 0.02}
        self.cheap_hour = self.box.offer(**{**prices, "dph_base": 0.3, "inet_down_cost": 0.1})["id"]
        self.slow = self.box.offer(**{**prices, "dph_base": 0.33, "inet_down": 8.0})["id"]
        self.best = self.box.offer(**prices)["id"]
        self.untold = self.box.offer(**{**prices, "dph_base": 0.2, "inet_down_cost": None})["id"]

    def test_the_price(self):
        rows = self.client.search_offers(self.query, hours=10, down=36, up=5)
        self.assertEqual([row["id"] for row in rows], [self.best, self.cheap_hour, self.slow, self.untold])
        self.assertAlmostEqual(rows[0]["job_total"], 0.36 * (10 + 36 * 8000 / 800 / 3600) + 36 * 0.01 + 5 * 0.02)
        self.assertAlmostEqual(rows[2]["job_total"], 0.33 * (10 + 10) + 36 * 0.01 + 5 * 0.02)
        self.assertIsNone(rows[3]["job_total"])
        body = self.last("/api/v0/bundles/")["body"]
        self.assertEqual((body["order"], "limit" in body, body["allocated_storage"]), ([["dph_total", "asc"]], False, 5.0))
        printed = self.raw(f"search offers '{self.query}' --hours 10 --down 36 --up 5")
        self.assertEqual([row["job_total"] for row in printed], [row["job_total"] for row in rows])

    def test_each_option_alone(self):
        for options, price in (({"hours": 2}, 0.72), ({"down": 36}, 0.36 * 0.1 + 0.36), ({"up": 5}, 0.1)):
            row, = [row for row in self.client.search_offers(self.query, **options) if row["id"] == self.best]
            self.assertAlmostEqual(row["job_total"], price)
        self.assertNotIn("job_total", self.client.search_offers(self.query)[0])
        self.box.market.tables["offers"][self.best]["inet_up_cost"] = -0.02
        row, = [row for row in self.client.search_offers(self.query, up=5) if row["id"] == self.best]
        self.assertIsNone(row["job_total"], "no price is below zero")
        untold, = [row for row in self.client.search_offers(self.query, hours=2) if row["id"] == self.untold]
        self.assertAlmostEqual(untold["job_total"], 0.4, msg="what costs nothing need not be known")

    def test_what_is_said(self):
        _, out, err = self.run_here(f"search offers '{self.query}' --hours 10 --down 36 --limit 2")
        self.assertEqual([line.split()[0] for line in out.splitlines()], ["ID", str(self.best), str(self.cheap_hour)])
        self.assertIn("$_job", out.splitlines()[0].split())
        self.assertIn("compared 4 offers", err)
        self.assertIn("5 GB of disk", err)
        self.assertIn("2 offers (--limit reached)", err)
        err = self.run_here(f"search offers '{self.query}' --hours 10 --storage 5 -o id")[2]
        self.assertNotRegex(err, "compared|5 GB")

    def test_the_order_and_limit_of_the_caller(self):
        rows = self.client.search_offers(self.query, hours=1, order="id-", limit=2)
        self.assertEqual([row["id"] for row in rows], [self.untold, self.best])
        self.assertEqual(self.last("/api/v0/bundles/")["body"]["limit"], 2)

    def test_wrong_use(self):
        for options in ("--hours 0", "--hours -1", "--down x", "--up -1", "--hours nan"):
            self.assertEqual(self.run_here(f"search offers {options}")[0], 2, options)
        self.assertEqual(self.box.requests, [])


class AddressTest(CommandCase):
    """Where an instance can be reached."""

    box_options = {"boot": 0}

    def test_the_card(self):
        id = self.rented(jupyter=True, direct=True, wait=True, env="-p 7860:7860")
        row = self.client.show_instance(id)
        cards = dict(line.split(None, 1) for line in self.ok(f"show instance {id}").splitlines())
        self.assertEqual(cards["Address"], row["public_ipaddr"])
        at = {inner: f"{row['public_ipaddr']}:{outer[0]['HostPort']}" for inner, outer in row["ports"].items()}
        self.assertEqual(set(at), {"22/tcp", "8080/tcp", "7860/tcp"})
        self.assertEqual(set(cards["Ports"].split()), {f"{place}->{inner}" for inner, place in at.items()})
        self.assertEqual(cards["Jupyter"], f"https://{at['8080/tcp']}/?token={row['jupyter_token']}")

    def test_jupyter_behind_the_proxy(self):
        id = self.rented(jupyter=True, wait=True)
        row = self.client.show_instance(id)
        self.assertIn(f"https://jupyter.vast.ai/jm/{row['ssh_idx']}/{row['ssh_port']}/?token={row['jupyter_token']}\n",
                      self.ok(f"show instance {id}"))
        self.assertNotIn("Jupyter", self.ok(f"show instance {self.rented(ssh=True, wait=True)}"))

    def test_after_a_rental(self):
        status, _, err = self.run_here(f"create instance {self.cheapest()} --image i --jupyter --direct --wait")
        self.assertEqual(status, 0)
        self.assertRegex(err, r"Ports: \d+\.\d+\.\d+\.\d+:\d+->22/tcp")
        self.assertRegex(err, r"Jupyter: https://\d+\.\d+\.\d+\.\d+:\d+/\?token=\w+\n")


class EmptySearchTest(CommandCase):
    """A search that finds nothing says why."""

    def test_the_name_of_a_model(self):
        for name, model in (("rtx_4090", "RTX_4090"), ("4090", "RTX_4090"), ("RTX4090", "RTX_4090"), ("a100", "A100_SXM4"),
                            ("'NVIDIA RTX A6000'", "RTX_A6000"), ("h100_sxm", "H100_SXM")):
            err = self.run_here(["search", "offers", f"gpu_name={name}"])[2]
            self.assertIn(f"write gpu_name={model}", err)
        self.assertIn("Fewer conditions", self.run_here("search offers 'gpu_name=RTX_9090 num_gpus=3'")[2])
        self.assertEqual(len(self.box.requests), 7, "a pipe gets no further search")


def vast_charge(source):
    """What an instance that ran half a day has cost, as the service tells it."""
    now = time.time()
    amounts = {"gpu": 4.0, "disk": 1.0, "bwd": 0.5, "bwu": 0.25}
    items = [{"type": name, "amount": amount, "items": []} for name, amount in amounts.items()]
    return {"start": now - DAY / 2, "end": now, "type": "instance", "source": source, "metadata": {}, "amount": 5.75,
            "items": items}


class CloudCopyTest(CommandCase):
    """A cloud copy that is scheduled: a job is made, and nothing is copied now."""

    def setUp(self):
        super().setUp()
        market = self.box.market
        self.id, self.connection = next(iter(market.tables["instances"])), next(iter(market.tables["connections"]))
        self.line = (f"cloud copy --src /workspace --dst backups --instance {self.id} --connection {self.connection} "
                     "--schedule DAILY --day '*' --hour 3 ")

    def jobs(self):
        return self.box.market.rows("jobs")

    def test_the_job(self):
        self.ok(self.line)
        job, = self.jobs()
        self.assertEqual((job["api_endpoint"], job["request_method"]), ("/api/v0/commands/rclone/", "POST"))
        self.assertEqual((job["frequency"], job["hour_of_the_day"], job["day_of_the_week"]), ("DAILY", 3, None))
        self.assertEqual(job["request_body"]["transfer"], "Instance to Cloud")
        self.assertEqual(int(job["end_time"]), int(self.box.market.tables["instances"][self.id].row["end_date"]))
        self.assertFalse([call for call in self.box.requests if call["path"] == "/api/v0/commands/rclone/"])

    def test_upload_that_costs_is_asked_about(self):
        self.box.instance(self.id, differs={"internet_up_cost_per_tb": 5.5})
        status, _, err = self.run_here(self.line, stdin="n\n")
        self.assertEqual((status, self.jobs()), (2, []))
        self.assertIn("5.5", err)
        self.ok(self.line, stdin="y\n")
        self.assertEqual(len(self.jobs()), 1)

    def test_a_second_job_replaces_the_first_on_demand(self):
        self.ok(self.line)
        again = self.line.replace("--hour 3", "--hour 5")
        self.assertNotEqual(self.run_here(again, stdin="n\n")[0], 0)
        self.assertEqual([job["hour_of_the_day"] for job in self.jobs()], [3])
        self.ok(again, stdin="y\n")
        self.assertEqual([job["hour_of_the_day"] for job in self.jobs()], [5])

    def test_only_to_the_cloud(self):
        status, _, err = self.run_here(self.line + "--transfer 'Cloud to Instance'")
        self.assertEqual((status, self.box.requests), (2, []))
        self.assertIn("--transfer", err)


class SecondFactorTest(CommandCase):
    """The steps of 2FA that talk with a person."""

    def bodies(self, path):
        return [(call["method"], call["body"]) for call in self.box.requests if call["path"] == path]

    def test_both_steps_of_auth_new(self):
        status, _, err = self.run_here("tfa auth-new -t totp", stdin=RIGHT_CODE + "\n")
        self.assertEqual(status, 0, err)
        (first, asked), (second, given) = self.bodies("/api/v0/tfa/authorize-new-method/")
        self.assertEqual((first, asked, second), ("POST", {"tfa_method": "totp"}, "PUT"))
        self.assertEqual(given["code"], RIGHT_CODE)
        self.assertIn(given["secret"], err)

    def test_the_first_step_of_auth_new_alone(self):
        status, _, err = self.run_here("tfa auth-new", stdin="")
        secret = re.search("[0-9a-f]{16}", err).group()
        self.assertEqual(status, 1)
        self.assertEqual(self.bodies("/api/v0/tfa/authorize-new-method/"), [("POST", {"tfa_method": "email"})])
        self.assertIn(f"vastai tfa auth-new --secret {secret} --code ", err)
        self.ok(f"tfa auth-new --secret {secret} --code {RIGHT_CODE}")
        answer = self.client.tfa_auth_new(method_id=77)
        self.assertTrue(answer["secret"])
        method, body = self.bodies("/api/v0/tfa/authorize-new-method/")[-1]
        self.assertEqual((method, list(body), int(body["tfa_method_id"])), ("POST", ["tfa_method_id"], 77))

    def test_a_backup_code_needs_one_step(self):
        self.ok(f"tfa auth-new --backup-code {BACKUP_CODES[0]}")
        self.assertEqual(self.bodies("/api/v0/tfa/authorize-new-method/"), [("POST", {"backup_code": BACKUP_CODES[0]})])

    def regenerate(self, *answers):
        """(stdout, stderr) after these answers to the questions where new codes are to go."""
        lines = "".join(f"{answer}\n" for answer in answers)
        status, out, err = self.run_here(f"tfa regen-codes -c {RIGHT_CODE} -y", stdin=lines)
        self.assertEqual(status, 0, err)
        return out, err

    def check_file(self, path, out, err):
        with open(path) as file:
            self.assertLessEqual(set(BACKUP_CODES), set(file.read().split("\n")))
        if os.name == "posix":
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertNotIn(BACKUP_CODES[0], out + err)
        self.assertIn(path, out + err)

    def test_codes_in_another_file(self):
        path, taken = os.path.join(self.home, "codes"), os.path.join(self.home, "taken")
        with open(taken, "w") as file:
            file.write("mine")
        out, err = self.regenerate("2", taken, "2", path)
        self.check_file(path, out, err)
        self.assertIn("taken", err)
        with open(taken) as file:
            self.assertEqual(file.read(), "mine")
        out, err = self.regenerate("2", self.home)  # a folder: a file of the usual name in it
        name, = [name for name in os.listdir(self.home) if "backup_codes" in name]
        self.check_file(os.path.join(self.home, name), out, err)

    def test_codes_on_the_screen(self):
        out, _ = self.regenerate("3", "y")
        self.assertLessEqual(set(BACKUP_CODES), set(out.split("\n")))
        out, err = self.regenerate("3", "n", "1")  # who does not want that is asked again
        folder = os.path.join(self.home, "Downloads")
        name, = os.listdir(folder)
        self.check_file(os.path.join(folder, name), out, err)


# -------------------------------------------------------------------- renting: clean up for certain


class RentingCase(CommandCase):
    """A sandbox whose account must hold, in the end, exactly the instances that it should."""

    box_options = {"boot": 0.1}

    def setUp(self):
        super().setUp()
        self.before = set(self.box.market.tables["instances"])

    @property
    def held(self):
        """The instances that have come since the beginning, oldest first; none of the others may have gone."""
        ids = set(self.box.market.tables["instances"])
        self.assertLessEqual(self.before, ids, "something foreign was destroyed")
        return sorted(ids - self.before)

    def sent(self, pattern):
        """The requests whose 'METHOD /path' matches."""
        return [request for request in self.box.requests
                if re.fullmatch(pattern, f"{request['method']} {request['path']}")]

    def begin(self, line, **options):
        """A line in a process of its own, with its streams as pipes."""
        words = shlex.split(line) if isinstance(line, str) else [str(word) for word in line]
        options = {"env": {**self.environment, "PATH": os.environ["PATH"]}, "stdin": subprocess.DEVNULL,
                   "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
        process = subprocess.Popen([sys.executable, compiled(), *words], **options)
        for stream in filter(None, (process.stdout, process.stderr)):
            self.addCleanup(stream.close)
        self.addCleanup(process.kill)
        return process

    def until(self, ready, seconds=60):
        """Waits until something holds."""
        end = time.monotonic() + seconds
        while not ready():
            self.assertLess(time.monotonic(), end, "it never came to that")
            time.sleep(0.01)

    def signaled(self, line, ready, *numbers, **options):
        """(status, stdout, stderr) of a process that gets these signals once it has come so far, each when `ready`
        (a function, or one for each signal) holds. Of two signals of one kind, a busy machine delivers one, if nothing
        shows that the first has come."""
        process = self.begin(line, **options)
        conditions = ready if isinstance(ready, (list, tuple)) else [ready] * len(numbers)
        for number, condition in zip(numbers, conditions):
            self.until(condition)
            process.send_signal(number)
            time.sleep(0.05)
        out, err = process.communicate(timeout=60)
        self.assertNotIn("Traceback", err or "")
        return process.returncode, out, err


class TestGivingBack(RentingCase):
    def looked_at(self):
        return self.sent("GET /api/v0/instances/\\d+/")

    def test_polling(self):
        """Pauses grow to a limit, begin again when something moves, and heed the service; the clock is the test's."""
        now, slept = [0.0], []

        def sleep(seconds):
            slept.append(round(seconds, 3))
            now[0] += seconds
        looks = [None, None, vastai.MOVED, vastai.RateLimitError("slow", retry_after=7.0), None, "here"]

        def look(left):
            result = looks.pop(0)
            if isinstance(result, Exception):
                raise result
            return result
        poll = functools.partial(vastai.poll_until, clock=lambda: now[0], sleep=sleep)
        self.assertEqual(poll(look, 100, 1, 1.5), "here")
        self.assertEqual(slept, [1, 1.25, 1, 7, 1.5])
        del slept[:]
        self.assertIsNone(poll(lambda left: None, 3, 2))
        self.assertEqual(slept, [2, 1], "the last look is at the end")
        del slept[:]
        self.assertIsNone(poll(lambda left: None, vastai.FOREVER, 10, tries=3))
        self.assertEqual(slept, [10, 10])

    def test_what_can_never_run(self):
        def fault(exited_before=False, **row):
            return vastai.fault_of({"intended_status": "running", "actual_status": "loading", **row}, exited_before)[0]
        for told, expected in (
                ("Error response from daemon: manifest unknown", "image"), ("pull access denied for x", "image"),
                ("Error response from daemon: Get https://r/v2/: unauthorized", "image"),
                ("repository does not exist", "image"), ("no matching manifest for linux/arm64", "image"),
                ("OCI runtime create failed: runc", "host"), ("Error response from daemon: oh", "host"),
                ("write /x: no space left on device", "host"), ("unexpected EOF", "host"), ("failed to pull", "host"),
                ("Pulling from pytorch/pytorch", ""), ("", ""), (None, "")):
            self.assertEqual(fault(status_msg=told), expected, told)
            self.assertEqual(fault(status_msg=told, actual_status="running"), "", "it runs, whatever it says")
        for state, expected in (("offline", "host"), ("unknown", "host"), ("exited", ""), ("created", ""), (None, "")):
            self.assertEqual(fault(actual_status=state), expected)
        self.assertEqual(fault(True, actual_status="exited"), "host")
        self.assertEqual(fault(actual_status="exited", intended_status="stopped"), "stopped")
        stopped = dict(intended_status="stopped", cur_state="stopped", next_state="stopped")
        for state in ("running", "created", "exited", None):
            self.assertEqual(fault(actual_status=state, **stopped), "stopped")

    def test_waits_that_can_only_fail_end_at_once(self):
        id = self.rented()
        for behavior in ({"status": "offline"}, {"status": "unknown"}, {"status": "exited"},
                          {"starts": False, "message": "OCI runtime create failed: no such file"}):
            self.box.instance(id, **{**BEHAVIOR, **behavior})
            status, out, err = self.run_here(f"wait instance {id} --poll 0.2 --max-wait 9")
            self.assertEqual((status, out), (1, ""), behavior)
            self.assertRegex(err, f"instance {id} cannot become running")
        self.box.instance(id, **BEHAVIOR)
        bid = self.client.create_instance(self.cheapest(type="bid"), image="a/b", price=9.0)["new_contract"]
        self.box.outbid(bid)
        status, out, err = self.run_here(f"wait instance {bid} --poll 0.2")
        self.assertEqual(status, 1)
        self.assertRegex(err, f"outbid(.|\\n)*`vastai change bid {bid} --price [0-9.]+`")
        err = self.run_here(f"wait instance {bid} --poll 0.2 --raw")[2]
        self.assertIn(f"`vastai change bid {bid} --price", json.loads(err)["hint"])
        self.assertEqual(self.held, [id, bid], "a wait destroys nothing")

    def test_a_restart_is_waited_for(self):
        """One look that shows `exited` is part of it."""
        answers = [{"actual_status": state, "intended_status": "running"} for state in ("exited", "loading", "exited", "running")]
        with Faulty(*[reply({"instances": row}) for row in answers]) as server:
            client = vastai.VastAI("key-123456", server.url)
            self.assertEqual(client.wait_instance(7, poll=0.01)["actual_status"], "running")

    def test_a_new_instance_may_not_be_there_yet(self):
        self.box.machine(None, hidden=0.2, hidden_as=404)
        answer = self.client.create_instance(self.cheapest(), image="a/b", wait=True)
        self.assertEqual(answer["instance"]["actual_status"], "running")
        id = answer["new_contract"]
        waiting = self.begin(f"wait instance {id} --status exited --poll 0.2")
        count = len(self.looked_at())
        self.until(lambda: len(self.looked_at()) > count + 1)
        self.client.destroy_instance(id)
        out, _err = waiting.communicate(timeout=60)
        self.assertEqual((waiting.returncode, out), (4, ""), "what was seen, and is gone, is gone")

    def test_a_poll_of_nothing_does_not_flood(self):
        id = self.rented()
        self.box.instance(id, starts=False)
        with fast_clock():
            self.assertEqual(self.run_here(f"wait instance {id} --poll 0 --max-wait 1")[0], 9)
        self.assertLess(len(self.looked_at()), 12)

    def test_less_disk_than_asked_for(self):
        self.box.machine(None, differs={"disk_space": 8.0})
        with fast_clock():
            status, _out, err = self.run_here(f"create instance {self.cheapest()} --image a/b --disk 40 --wait")
        self.assertEqual(status, 0, err)
        self.assertIn("8 GB of disk, not 40 GB", err)

    # What a refusal left behind

    def test_refused_but_made(self):
        offer = self.cheapest(type="bid")
        line = f"create instance {offer} --image a/b --bid_price 0.0001"
        status, out, err = self.run_here(line)
        id, = self.held
        self.assertEqual((status, out), (1, ""))
        self.assertRegex(err, f"instance {id}(.|\\n)*billed(.|\\n)*`vastai destroy instance {id}`")
        status, out, err = self.run_here(line.replace(str(offer), str(self.cheapest(type="bid"))) + " --raw")
        self.assertEqual((status, out, json.loads(err)["found"]), (1, "", self.held[1]))
        with self.assertRaises(vastai.VastAIError) as caught:
            self.client.create_instance(self.cheapest(type="bid"), image="a/b", price=0.0001)
        self.assertEqual(caught.exception.found, self.held[2])

    def test_refused_but_made_is_given_back(self):
        status, out, err = self.run_here(
            f"create instance {self.cheapest(type='bid')} --image a/b --bid_price 0.0001 --cancel-unavail")
        self.assertEqual((status, out, self.held, len(self.sent("DELETE .*"))), (1, "", [], 1), err)
        self.assertIn("destroyed", err)

    def test_refused_with_success(self):
        """HTTP 200 with `"success": false`, and an instance: of one, and of several."""
        for body, found in (({"new_contract": 501}, 501), ({"new_contracts": [501, 502]}, [501, 502])):
            with Faulty(reply({"success": False, "msg": "no", **body})) as server:
                line = f"create instance{'s' if isinstance(found, list) else ''} 7 --image x --url {server.url}"
                status, out, err = self.run_here(line)
                self.assertEqual((status in (1, 8), "destroy instance 501" in err), (True, True), out + err)
                self.assertIn("is billed for its disk", " ".join(err.split()))
                err = self.run_here(line + " --raw")[2]
                self.assertEqual(json.loads(err)["found"], found)
        with Faulty(reply({"success": False, "msg": "no", "new_contract": 501})) as server:
            result = vastai.VastAI("key-123456", server.url).create_instance(7, image="x")
            self.assertEqual((result["success"], result["new_contract"]), (False, 501))
            self.assertIn("`vastai destroy instance 501` ends it", result["msg"], "a program may look at nothing else")
        for status in (408, 503):
            with Faulty(reply({"success": False, "msg": "no", "new_contract": 501}, status)) as server:
                for words in ("", " --label mine", " --confirm"):
                    got = self.run_here(f"create instance 7 --image x --url {server.url} --raw{words}")
                    error = json.loads(got[2])
                    self.assertEqual((got[0], error["found"], "destroy instance 501`" in error["msg"]), (7, 501, True))
                    self.assertNotIn("its disk", error["msg"], "it may be running")
                    self.assertEqual(server.requests.pop()["method"], "PUT", "nothing is left to be looked for")

    def test_success_without_an_id(self):
        for body in ({"success": True}, {}, {"success": True, "new_contract": None}):
            for words in ("create instance 7", "create instances 7 8", "launch instance -g RTX_4090 -n 1"):
                with Faulty(reply(body)) as server:
                    status, out, err = self.run_here(f"{words} --image x --url {server.url}")
                self.assertEqual((status, out, "show instances" in err), (7, "", True), (body, words))

    def test_one_instance_is_not_two(self):
        for body in ({"new_contracts": [501, 501]}, {"new_contract": 501, "new_contracts": [501]}):
            with Faulty(reply({"success": True, **body})) as server:
                status, out, err = self.run_here(f"create instances 7 8 --image x --url {server.url}")
            self.assertEqual((status, out, err.count("named 1 of 2 instances")), (7, "", 1), err)

    def test_a_label_of_our_own_needs_no_clock(self):
        """The service's clock may be behind; it matters only for labels that others may have as well."""
        def instances(request):
            if request["method"] == "PUT":
                return reply({}, 504)
            label = json.loads(urllib.parse.parse_qs(urllib.parse.urlsplit(request["target"]).query)["select_filters"][0])
            return reply({"instances": [{"id": 42, "label": label["label"]["in"][0], "start_date": time.time() - 300}]})
        with Faulty(route=instances) as server:
            client = vastai.VastAI("key-123456", server.url, retry=1)
            for given, found in (({"confirm": True}, 42), ({"label": "mine"}, None)):
                with self.assertRaises(vastai.OutcomeUnknownError) as caught:
                    client.create_instance(7, image="x", **given)
                self.assertEqual(caught.exception.found, found)

    def test_an_error_with_status_200_is_a_refusal(self):
        for line in ("destroy instance 7 -y", "stop instance 7", "start instance 7", "label instance 7 x",
                     "reboot instance 7", "stop instances 7 8", "destroy instances 7 8 -y"):
            with Faulty(reply({"error": "offline", "msg": "the host is offline"})) as server:
                status, out, err = self.run_here(f"{line} --url {server.url}")
            self.assertEqual((status, out, "the host is offline" in err), (1, "", True), line)
        with Faulty(reply({"success": True, "error": "a remark"})) as server:
            self.assertEqual(self.run_here(f"stop instance 7 --url {server.url}")[0], 0)
        with Faulty(reply({"error_msg": "the host is offline"})) as server:
            self.assertEqual(self.run_here(f"stop instance 7 --url {server.url}")[0], 1)

    def test_an_empty_answer_confirms_nothing(self):
        for line in ("destroy instance 7 -y", "stop instance 7", "start instance 7", "start instances 7 8",
                     "stop instances 7 8", "destroy instances 7 8 -y", "reboot instance 7", "recycle instance 7",
                     "label instance 7 x", "update instance 7 --image a/b"):
            with Faulty(reply({})) as server:
                status, out, err = self.run_here(f"{line} --url {server.url}")
            self.assertEqual((status, out, "`vastai show " in err), (1, "", True), line)
        for answer in ('"no such host"', "[]", "null"):
            with Faulty(reply(answer)) as server:
                status, out, err = self.run_here(f"stop instance 7 --url {server.url}")
            self.assertEqual((status, out), (1, ""), answer)
        with Faulty(reply({"new_contract": -1})) as server:
            self.assertEqual(self.run_here(f"create instance 8 --image a/b --url {server.url}")[0], 7)

    def test_an_error_beside_a_message(self):
        for answer, told in (({"error": "cannot do it: host offline", "msg": "x"}, "cannot do it: host offline: x"),
                             ({"error": "no_such_ask", "msg": "It is gone."}, "It is gone."),
                             ({"error": True, "msg": "It is gone."}, "It is gone."),
                             ({"error": {"code": 5, "message": "host offline"}}, "host offline"),
                             ({"success": False, "error_msg": {"disk": "too small"}}, '{ "disk": "too small" }'),
                             ({"success": False, "error": [{"msg": "too small"}]}, "too small")):
            with Faulty(reply(answer)) as server:
                self.assertEqual(self.run_here(f"stop instance 7 --url {server.url}"),
                                 (1, "", f"stop instance: {told}\n"))

    def test_waiting_for_what_was_changed(self):
        id = self.rented()
        for line, state in (("stop instance", "exited"), ("start instance", "running"), ("reboot instance", "running"),
                            ("recycle instance", "running")):
            with fast_clock():
                self.assertIn(f"Instance {id} is {state}.", self.ok(f"{line} {id} --wait"))
                self.assertEqual(self.client.show_instance(id)["actual_status"], state)
        self.assertEqual(self.client.stop_instance(id, wait=True)["instance"]["actual_status"], "exited")

    def test_the_old_state_is_not_the_new_one(self):
        """Right after a restart the service may still show what was before."""
        states = ["running", "running", "loading", "running"]
        steps = [reply({"success": True}), *[reply({"instances": {"id": 7, "actual_status": state,
                                                                  "intended_status": "running"}}) for state in states]]
        for verb, first in (("reboot", "running"), ("start", "exited")):
            steps[1:3] = [reply({"instances": {"id": 7, "actual_status": first, "intended_status": "running"}})] * 2
            with Faulty(*steps) as server, fast_clock():
                client = vastai.VastAI("key-123456", server.url)
                self.assertEqual(getattr(client, f"{verb}_instance")(7, wait=True)["instance"]["actual_status"], "running")
                self.assertEqual(len(server.requests), 5)

    # Signals

    def test_a_wait_for_a_rental_says_its_id(self):
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            self.box.machine(None, starts=False)
            count = len(self.looked_at())
            status, out, err = self.signaled(f"create instance {self.cheapest()} --image a/b --wait",
                                              lambda count=count: len(self.looked_at()) > count, number)
            self.assertEqual((status, out), (expected, ""))
            self.assertIn(f"vastai destroy instance {self.held[-1]}", err)
        self.assertEqual(len(self.held), 3, "it is the user's: nothing is given back")

    def test_a_rental_under_way(self):
        with Faulty(stall) as server:
            status, out, err = self.signaled(f"create instance 7 --image x --url {server.url}",
                                              lambda: server.requests, signal.SIGTERM)
        self.assertEqual((status, out, "show instances" in err), (143, "", True))

    def test_a_rental_that_is_about_to_be_printed(self):
        for words in ("--raw", "-q", ""):
            with Faulty(reply({"success": True, "new_contract": 501})) as server:
                reader, writer = os.pipe()
                os.set_blocking(writer, False)
                with contextlib.suppress(BlockingIOError):
                    while True:
                        os.write(writer, bytes(512))  # stdout has no room
                os.set_blocking(writer, True)
                process = self.begin(f"create instance 7 --image x {words} --url {server.url}", stdout=writer)
                self.until(lambda: server.requests)
                time.sleep(0.5)
                process.send_signal(signal.SIGTERM)
                os.close(writer)
                with open(reader, "rb") as file:
                    file.read()
                err = process.communicate(timeout=60)[1]
            self.assertEqual(process.returncode, 143)
            self.assertRegex(err, "'new_contract': 501|is unknown", "the second on a slow machine")

    def test_a_rental_that_is_looked_for(self):
        """The answer was lost; an interruption of the search does not hide that."""
        def route(request):
            return reply({}, 504) if request["method"] == "PUT" else stall
        for words in ("--confirm", "--label mine"):
            with Faulty(route=route) as server:
                status, out, err = self.signaled(f"create instance 7 --image x {words} --url {server.url}",
                                                 lambda: len(server.requests) == 2, signal.SIGINT)
            self.assertEqual((status, out, "was created is unknown; check with `vastai show instances`" in err), (130, "", True))

    def test_many_rentals_of_which_some_are_made(self):
        made = reply({"success": True, "new_contracts": list(range(501, 565))})
        ids = " ".join(map(str, range(1, 101)))
        with Faulty(made, stall) as server:
            status, out, err = self.signaled(f"create instances {ids} --image x --url {server.url}",
                                              lambda: len(server.requests) == 2, signal.SIGINT)
        self.assertEqual((status, out), (130, ""))
        self.assertRegex(err, r"unknown: 65, 66(.|\n)*created: instances 501, 502(.|\n)*564")

    def test_many_rentals_of_which_some_are_unclear(self):
        ids = " ".join(map(str, range(1, 101)))
        made = reply({"success": True, "new_contracts": list(range(501, 537))})
        for second, expected in ((reply({"msg": "who?"}, 401), 7), (reply({"msg": "no"}, 400), 7), (made, 8)):
            with Faulty(hang_up, second) as server:
                status, _out, err = self.run_here(f"create instances {ids} --image x --url {server.url}")
            self.assertEqual(status, expected, err)
            self.assertRegex(err, r"(?s)unknown: 1, 2, 3.* 64")
            self.assertEqual("instances 501, 502" in err, second is made)

    def test_many_rentals_without_stdout(self):
        """The results are lost, but not what was made."""
        made = reply({"success": True, "new_contracts": list(range(501, 565))})
        ids = " ".join(map(str, range(1, 301)))
        for words in ("", "--raw", "--format csv", "-q"):
            with Faulty(made, reply({"msg": "no " * 2000}, 400)) as server:
                line = f"{sys.executable} {compiled()} create instances {ids} --image x --url {server.url} {words} >/dev/full"
                done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, encoding="utf-8", timeout=30,
                                      env={**self.environment, "PATH": os.environ["PATH"]})
            self.assertIn("created: instances 501, 502", done.stderr, words)

    def test_many_rentals_that_are_refused_but_made(self):
        """What is not given back, or not yet, is named."""
        made = reply({"success": False, "msg": "no", "new_contracts": [501, 502]}, 400)

        def route(request):
            return reply({"success": False, "msg": "busy"}, 500) if request["method"] == "DELETE" else made
        with Faulty(route=route) as server:
            line = f"create instances 7 8 --image x --cancel-unavail --url {server.url}"
            status, out, err = self.signaled(line, lambda: len(server.writes) > 1, signal.SIGINT)
            self.assertEqual((status, out, "created: instances 501, 502" in err), (130, "", True), err)
            with fast_clock():
                status, out, err = self.run_here(f"{line} --raw")
        self.assertEqual((status, out, json.loads(err.splitlines()[-1])["found"]), (8, "", [501, 502]), err)
        with Faulty(reply({"success": True, "new_contract": 501})) as server:
            self.assertEqual(self.ok(f"create instances 7 --image x -q --url {server.url}"), "501\n")

    def test_a_self_test_gives_back(self):
        self.box.machine(None, starts=False)
        machine = self.client.search_offers("num_gpus=1", limit=1)[0]["machine_id"]
        line = f"self-test machine {machine} --ignore-requirements --no-support-bundle"
        for number, expected, hidden in ((signal.SIGTERM, 143, 0), (signal.SIGINT, 130, 30)):
            self.box.machine(None, hidden=hidden)  # what is not there yet is not gone
            count = len(self.looked_at())
            status, _out, err = self.signaled(line, lambda count=count: len(self.looked_at()) > count, number)
            self.assertEqual((status, self.held), (expected, []), err)
            self.assertIn("Destroyed all that was rented", err)

    def test_benchmarks_give_back(self):
        """Endpoint, workergroup and worker, also if the answer to one of them is still under way."""
        tables = self.box.market.tables
        before = {name: set(tables[name]) for name in ("endpoints", "workergroups", "instances")}
        template = next(iter(tables["templates"]))
        line = f"run benchmarks --template_id {template} --gpus RTX_4090 --no-cache -y"
        for number, path, expected in ((signal.SIGTERM, "GET .*/get_endpoint_workers/.*|POST .*/get_endpoint_workers/", 143),
                                       (signal.SIGINT, "POST /api/v0/autojobs/", 130)):
            del self.box.requests[:]
            got = self.signaled(line, lambda path=path: self.sent(path), number)
            self.assertEqual((got[0], {name: set(tables[name]) for name in before}), (expected, before), got[2])

    def benchmark(self, status):
        """What a benchmark with this exit status, for which the time is short, wrote to stderr."""
        template = next(iter(self.box.market.tables["templates"]))
        with fast_clock():
            got = self.run_here(f"run benchmarks --template_id {template} --gpus RTX_4090 --no-cache -y --timeout 0.1")
        self.assertEqual(got[0], status, got[2])
        return got[2]

    def test_benchmarks_whose_workers_cannot_be_listed(self):
        self.box.fail("POST /get_endpoint_workers/", 500, "oh", times=3)
        self.assertRegex(self.benchmark(0), r"(?m)^Renting 1x RTX 4090 at about \$[0-9.]+/hr", "though nobody was asked")
        self.assertEqual(self.held, [])
        self.box.fail("POST /get_endpoint_workers/", 500, "oh", times=99)
        err = self.benchmark(8)
        self.assertEqual(self.held, [], "the deletion of the workergroup has named it")
        self.assertRegex(err, r"the workers of endpoint \d+ could not be listed; check with `vastai show instances`")

    def test_benchmarks_that_are_refused(self):
        """What a refusal has not made is not searched for."""
        self.box.fail("POST /api/v0/endptjobs/", 400, {"msg": "no"})
        self.benchmark(1)
        self.assertEqual((self.sent("GET /api/v0/endptjobs/"), self.held), ([], []))

    def test_benchmarks_whose_workers_outlive_their_workergroup(self):
        """Those that its deletion names, gone or left, and those that come up meanwhile, are given back as well."""
        serve, deleted = self.box.answer, []
        for named in ("", "failed_workers", "deleted_workers"):
            del deleted[:]

            def answer(call, named=named):
                status, body, headers = serve(call)
                if call.path == "/get_endpoint_workers/":
                    body = {"workers": [{"id": id, "status": "loading"} for id in deleted]}
                elif call.path.startswith("/api/v0/autojobs/") and call.method == "DELETE":
                    body = {"success": True, named: self.held}
                    deleted[:] = [] if named else self.held
                return status, body if isinstance(body, str) else json.dumps(body), headers
            self.box.answer = answer
            self.benchmark(0)
            self.assertEqual(self.held, [], named)
        self.assertEqual(len(self.sent("DELETE /api/v0/instances/.*")), 3)

    def test_benchmarks_whose_workers_cannot_be_given_back(self):
        self.box.fail("DELETE /api/v0/instances/.*", 500, "oh", times=99)
        err = self.benchmark(8)
        price = vastai.format_rate(self.client.show_instance(self.held[0])["dph_total"])
        self.assertIn(f"is billed {price} until `vastai destroy instance {self.held[0]}`", err)

    def test_nohup_is_respected(self):
        self.box.machine(None, starts=False)
        machine = self.client.search_offers("num_gpus=1", limit=1)[0]["machine_id"]
        line = f"self-test machine {machine} --ignore-requirements --no-support-bundle"
        process = self.begin(line, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
        self.until(self.looked_at)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.2)
        self.assertEqual((process.poll(), len(self.held)), (None, 1), "a process under nohup goes on")
        process.terminate()
        self.assertEqual((process.wait(60), self.held), (143, []))

    def test_the_second_signal_ends_the_clean_up(self):
        self.box.machine(None, starts=False)
        self.box.fail("DELETE .*", 500, times=99)
        machine = self.client.search_offers("num_gpus=1", limit=1)[0]["machine_id"]
        status, _out, err = self.signaled(
            f"self-test machine {machine} --ignore-requirements --no-support-bundle",
            [self.looked_at, lambda: self.sent("DELETE .*")], signal.SIGTERM, signal.SIGTERM)
        self.assertEqual(status, 143)
        self.assertIn(f"vastai destroy instance {self.held[0]}", err)

    def test_a_terminal_that_is_gone(self):
        self.box.machine(None, starts=False)
        machine = self.client.search_offers("num_gpus=1", limit=1)[0]["machine_id"]
        master, slave = os.openpty()
        process = self.begin(f"self-test machine {machine} --ignore-requirements --no-support-bundle --debugging",
                             stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.until(self.looked_at)
        os.close(master)
        process.send_signal(signal.SIGHUP)
        self.assertEqual((process.wait(60), self.held), (129, []))

    def test_a_program_keeps_its_handlers(self):
        script = ("import signal, vastai\nsignal.signal(signal.SIGTERM, lambda *a: print('mine', flush=True))\n"
                  "with vastai.SignalGuard(): signal.raise_signal(signal.SIGTERM)\n"
                  "import threading\n"
                  "def inside():\n  with vastai.SignalGuard(): print(signal.getsignal(signal.SIGHUP) == signal.SIG_DFL)\n"
                  "threading.Thread(target=inside).start()\n")
        done = subprocess.run([sys.executable, "-c", script], cwd=HERE, capture_output=True, encoding="utf-8", timeout=20,
                              env={**self.environment, "PYTHONDONTWRITEBYTECODE": "1"})
        self.assertEqual((done.stdout, done.stderr), ("mine\nTrue\n", ""))

    # Giving back that meets obstacles

    def test_nothing_that_the_service_says_ends_it(self):
        id = self.rented()
        for odd in ("<html>", [], {"success": False, "msg": 7}, {"x": int("9" * 400)}, {"success": False, "error": {"a": 1}}):
            self.box.fail("DELETE .*", 200, odd)
        self.box.fail("DELETE .*", 401, {"msg": "who?"})
        self.box.fail("GET /api/v0/instances/.*", 200, {"instances": [[]]})
        rented = vastai.Rented(vastai.Call(self.client, vastai.METHODS["create_instance"], {}, vastai.View()), "instance", "")
        rented.id = id
        with mock.patch.object(time, "sleep"):
            rented.give_back()
        self.assertEqual((self.held, rented.id, rented.still_costs()), ([], None, ""))

    def test_what_is_not_there_yet_is_not_gone(self):
        id = self.rented()
        rented = vastai.Rented(vastai.Call(self.client, vastai.METHODS["create_instance"], {}, vastai.View()), "instance", "")
        for seen in (False, True):
            self.box.fail("DELETE .*", 404, {"msg": "no such instance"})
            with fast_clock():
                rented.id, rented.began, rented.seen = id, time.monotonic(), seen
                rented.give_back()
            if not seen:
                self.assertEqual((self.held, rented.id, len(self.sent("DELETE .*"))), ([], None, 2))

    def test_an_id_that_is_a_text(self):
        def route(request):
            return reply({"success": True, "results": [{"id": "7"}]})
        with Faulty(route=route) as server, mock.patch.object(time, "sleep"):
            client = vastai.VastAI("key-123456", server.url)
            rented = vastai.Rented(vastai.Call(client, vastai.METHODS["create_endpoint"], {}, vastai.View()), "endpoint", "x")
            rented.id = 7
            rented.give_back()
        self.assertEqual(rented.id, 7)

    def test_what_cannot_be_given_back_is_said(self):
        id = self.rented()
        rented = vastai.Rented(vastai.Call(self.client, vastai.METHODS["create_instance"], {}, vastai.View()), "instance", "")
        rented.id, rented.price = id, 0.41
        self.box.fail("DELETE .*", 500, {"msg": "busy"}, times=99)
        with mock.patch.object(time, "sleep"), self.assertRaises(vastai.PartialError) as caught, \
                vastai.CleanupGuard(rented.call, rented):
            pass
        self.assertEqual((len(self.sent("DELETE .*")), caught.exception.exit_status), (10, 8))
        self.assertRegex(str(caught.exception), rf"instance {id} .*\$0.41/hr.*`vastai destroy instance {id}`")


# ------------------------------------------------------------------------------- renting: the lease


class TestLease(RentingCase):
    def onstart(self, **options):
        self.client.create_instance(self.cheapest(), image="a/b", **options)
        return self.last("/api/v0/asks/.*")["body"].get("onstart")

    def test_what_is_sent(self):
        plain, given = self.onstart(max_hours=1.5), self.onstart(max_hours=1.5, onstart_cmd="echo hi\n")
        self.assertEqual(given, plain + "echo hi\n")
        self.assertLess(len(plain), 900)
        self.assertIn("+5400))", plain)
        self.assertNotIn(self.box.key, plain)
        self.assertIsNone(self.onstart())
        with open(os.path.join(self.home, "start.sh"), "w") as file:
            file.write("make\n")
        self.ok(f"create instance {self.cheapest()} --image a/b --onstart {file.name} --max-hours 1.5")
        self.assertEqual(self.last("/api/v0/asks/.*")["body"]["onstart"], plain + "make\n")
        self.ok(f"create instances {self.cheapest()} --image a/b --max-hours 1.5")
        self.assertEqual(self.last("/api/v0/asks/bulk/")["body"]["onstart"], plain)

    def test_the_template_keeps_its_commands(self):
        template = self.client.create_template(name="t", image="a/b", ssh=True, onstart_cmd="nvidia-smi\n")
        hash_id = self.client.search_templates("name=t")[0]["hash_id"]
        self.assertTrue(template["success"])
        self.assertRegex(self.onstart(max_hours=1, template_hash=hash_id), r"&\nnvidia-smi\n$")
        self.assertRegex(self.onstart(max_hours=1, template_hash=hash_id, onstart_cmd="mine"), r"&\nmine$")
        self.assertIsNone(self.onstart(template_hash=hash_id))

    def test_what_cannot_be(self):
        for line in ("--args --model x", "--vm", "--max-hours 0", "--max-hours -1", "--max-hours nan",
                     "--onstart-cmd " + "x" * 3500):
            line = line if line.startswith("--max-hours") else f"--max-hours 3 {line}"
            for command in ("create instance 7", "create instances 7 8"):
                del self.box.requests[:]
                status, out, err = self.run_here(f"{command} --image a/b {line}")
                self.assertEqual((status, out, self.box.requests), (2, "", []), (line, err))
        with self.assertRaises(vastai.UsageError):
            self.client.create_instance(7, image="a/b", max_hours=2, runtype="args")
        with self.assertRaises(vastai.UsageError):
            self.client.create_instance(7, template_hash="a1b2", max_hours=2, args_str="--model x")
        for line in ("create instance 7", "create instances 7 8"):
            status, _, err = self.run_here(line + " --image a/b --spot")
            self.assertEqual((status, "--bid_price" in err), (2, True), err)

    def shell(self, script, **environment):
        """Runs commands as a container does, where a minute is a moment; returns the process of the shell."""
        folder = os.path.join(self.home, "bin")
        os.makedirs(folder, exist_ok=True)
        program = pathlib.Path(folder, "sleep")
        if not program.exists():  # else an earlier script may be about to run it: "Text file busy"
            program.write_text(f"#!/bin/sh\nexec {shutil.which('sleep')} 0.05\n")
            program.chmod(0o755)
        environment = {"PATH": folder + os.pathsep + os.environ["PATH"], **environment}
        process = subprocess.Popen(["/bin/sh", "-c", script], env=environment, start_new_session=True,
                                   stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)

        def end():
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.addCleanup(end)
        self.addCleanup(process.stdout.close)
        return process

    @unittest.skipUnless(os.path.exists("/bin/sh"), "no shell here")
    def test_it_ends_the_instance(self):
        """In a real shell: at its time, after a 429 and with a broken file; a later time in the file prolongs it."""
        file = os.path.join(self.home, "lease")
        for content in (None, "rubbish\n"):
            id = self.rented(max_hours=1 / 3600, onstart_cmd="echo started\n")
            script = self.last("/api/v0/asks/.*")["body"]["onstart"].replace(vastai.LEASE_FILE, file)
            if content:
                with open(file, "w") as lease:
                    lease.write(content)
            self.box.fail("DELETE .*", 429)
            began = time.time()
            shell = self.shell(script, CONTAINER_ID=f"C.{id}", CONTAINER_API_KEY="of-the-container")
            self.assertEqual(shell.stdout.read(), b"started\n", "the commands start at once, and no stream stays open")
            self.assertEqual(shell.wait(60), 0)
            lease = pathlib.Path(file)
            self.until(lambda lease=lease: lease.exists() and lease.read_text().strip().isdigit())
            self.assertAlmostEqual(int(lease.read_text()), began + 1, delta=1.5)
            self.until(lambda id=id: id not in self.box.market.tables["instances"])
            self.assertEqual(self.sent("DELETE .*")[-1]["headers"]["Authorization"], "Bearer of-the-container")
            self.assertGreaterEqual(len(self.sent("DELETE .*")), 2)
            os.unlink(file)

    @unittest.skipUnless(os.path.exists("/bin/sh"), "no shell here")
    def test_it_can_be_prolonged_and_restarts_do_not(self):
        file = os.path.join(self.home, "lease")
        id = self.rented(max_hours=1 / 3600)
        script = self.last("/api/v0/asks/.*")["body"]["onstart"].replace(vastai.LEASE_FILE, file)
        with open(file, "w") as lease:
            lease.write(str(int(time.time()) + 1000))
        self.shell(script, CONTAINER_ID=f"C.{id}", CONTAINER_API_KEY="k")
        time.sleep(0.4)
        self.assertIn(id, self.held)
        with open(file, "w") as lease:
            lease.write(str(int(time.time()) - 5))
        self.until(lambda: id not in self.held)


# -------------------------------------------------------------------- renting: a machine that works


class TestLaunch(RentingCase):
    box_options = {"boot": 3, "clock": lambda: time.time()}  # the one that fast_clock() puts there

    def setUp(self):
        super().setUp()
        for offer in self.box.market.rows("offers"):
            offer.update(rentable=False)
        self.offers = [self.box.offer(machine_id=number, dph_base=price, disk_space=200.0, storage_cost=0.15)
                       for number, price in ((11, 0.2), (12, 0.3), (13, 0.4), (14, 0.5))]

    def launch(self, words="", status=0):
        """What a launch with this exit status wrote: to stderr, or with --raw the answer."""
        with fast_clock():
            got = self.run_here(f"launch instance --query num_gpus=1 -i a/b --disk 40 {words}")
        self.assertEqual(got[0], status, got[2])
        if status:
            self.assertEqual(got[1], "")
        return json.loads(got[1]) if "--raw" in words else got[2]

    def machines(self):
        """The machines that were rented, in order."""
        paths = [request["path"] for request in self.sent("PUT /api/v0/asks/\\d+/")]
        by_id = {f"/api/v0/asks/{offer['id']}/": offer["machine_id"] for offer in self.offers}
        return [by_id[path] for path in paths]

    def test_the_cheapest_that_works(self):
        answer, err = self.launch("--raw"), self.launch()
        self.client.destroy_instance(self.held[-1])
        self.assertEqual((answer["new_contract"], answer["instance"]["actual_status"], answer["tries"]),
                         (self.held[0], "running", []))
        self.assertEqual(self.machines(), [11, 12])
        order = [f"{request['method']} {request['path']}" for request in self.box.requests]
        self.assertEqual(order[:3], ["GET /api/v0/users/current", "POST /api/v0/bundles/",
                                     f"PUT /api/v0/asks/{self.offers[0]['id']}/"])
        search, rental = self.last("/api/v0/bundles/")["body"], self.last("/api/v0/asks/.*")["body"]
        self.assertEqual((search["type"], search["allocated_storage"], search["order"], search["disk_space"]["gte"],
                          search["num_gpus"], search["verified"]),
                         ("on-demand", 40.0, [["dph_total", "asc"], ["id", "asc"]], 40.0, {"eq": "1"}, {"eq": True}))
        self.assertEqual((rental["cancel_unavail"], rental["disk"], rental.get("price")), (True, 40.0, None))
        self.assertRegex(rental["label"], "^vastai-[0-9a-f]+$")
        self.assertRegex(err, r"Renting offer \d+, machine 12, 1x RTX_4090 in .*on demand, \$0.3083/hr including "
                              r"\$0.0083/hr for 40 GB of disk, traffic .*/GB up")

    def test_a_file_with_commands(self):
        """It is read once, and what has no effect is said once."""
        script = os.path.join(self.home, "on.sh")
        with open(script, "w") as file:
            file.write("true\n")
        told = self.launch(f"--onstart {script} --entrypoint x --env='-e A=1 --shm-size=1g'")
        rented, = self.sent("PUT /api/v0/asks/\\d+/")
        self.assertEqual(rented["body"]["onstart"], "true\n")
        self.assertEqual((told.count("takes precedence"), told.count("--shm-size")), (1, 1), told)

    def test_bad_machines_are_given_back(self):
        self.box.machine(11, starts=False, message="OCI runtime create failed")
        self.box.machine(12, starts=False)
        answer = self.launch("--start-timeout 60 --raw")
        self.assertEqual([(row["machine_id"], row["offer"]) for row in answer["tries"]],
                         [(11, self.offers[0]["id"]), (12, self.offers[1]["id"])])
        self.assertEqual((self.held, self.machines()), ([answer["new_contract"]], [11, 12, 13]))
        self.box.machine(13, status="offline")
        self.assertIn("found 1 x RTX 4090", self.launch(), "the last lines of the log")

    def test_tries_are_used_up(self):
        for number in (11, 12, 13, 14):
            self.box.machine(number, status="offline")
        err = self.launch("--tries 2 --exclude-machine 12", status=1)
        self.assertEqual(("", self.held, self.machines()), ("", [], [11, 13]))
        self.assertIn("--exclude-machine 12 --exclude-machine 11 --exclude-machine 13", err)
        self.assertRegex(err, "machine 11: .*offline")
        with fast_clock():
            status, out, err = self.run_here("launch instance --query num_gpus=1 -i a/b --tries 2 --raw")
        error = json.loads(err.splitlines()[-1])
        self.assertEqual((status, out, [row["machine_id"] for row in error["tries"]]), (1, "", [11, 12]))
        self.assertEqual(error["hint"], "For the next run: --exclude-machine 11 --exclude-machine 12")

    def test_what_is_not_as_ordered(self):
        for differs, words in (({"disk_space": 8.0}, "8 GB of disk"), ({"dph_total": 0.9}, "costs \\$0.9")):
            self.box.machine(11, differs=differs)
            answer = self.launch("--max-price 0.5 --raw")
            self.assertRegex(answer["tries"][0]["reason"], words)
        self.assertEqual(self.machines(), [11, 12, 11, 13])

    def test_spot(self):
        self.box.machine(11, differs={"is_bid": False})
        for offer in self.offers:
            offer["min_bid"] = round(offer["dph_base"] / 3, 6)
        answer = self.launch("--spot --bid-over 20 --raw")
        self.assertEqual((self.last("/api/v0/bundles/")["body"]["type"], self.last("/api/v0/asks/.*")["body"]["price"]),
                         ("bid", 0.12))
        self.assertEqual(self.sent("PUT /api/v0/asks/.*")[0]["body"]["price"], 0.081, "0.08 and a bit, rounded up")
        self.assertEqual([row["reason"] for row in answer["tries"]], ["it is on-demand, not interruptible"])
        self.assertIn("interruptible, bid $0.147/hr", self.launch("--spot"))
        self.launch("--spot --bid 0.01 --max-price 0.0101", status=4)
        self.box.fail("POST /api/v0/bundles/", 200, {"offers": [{**self.offers[3], "dph_total": 0.5, "storage_cost": None}]})
        self.launch("--spot --bid 0.9 --max-price 0.95", status=4)
        for words in ("--bid 0.1", "--bid-over 5", "--spot --bid 0.1 --bid-over 5", "--tries 0"):
            del self.box.requests[:]
            self.launch(words, status=2)
            self.assertEqual(self.box.requests, [])

    def test_a_bid_too_low(self):
        """What it made is given back, and counts as a try."""
        self.launch("--spot --bid 0.0001 --tries 2", status=1)
        self.assertEqual((len(self.machines()), self.held, len(self.sent("DELETE .*"))), (2, [], 2))
        self.box.fail("DELETE .*", 500, "oh", times=99)
        err = self.launch("--spot --bid 0.0001", status=8)
        self.assertRegex(err, f"instance {self.held[0]} could not .* is billed \\$0.0083/hr for its disk until")
        self.assertEqual((len(self.machines()), len(self.sent("DELETE .*"))), (3, 12))

    def test_exactly_at_the_cap(self):
        self.offers[0].update(dph_base=0.1, dph_total=0.3, storage_cost=3.6)  # 0.1 + 0.2 is a little more than 0.3
        self.launch("--max-price 0.3")
        self.assertEqual(self.machines(), [11])

    def test_an_order_that_begins_with_what_is_too_dear(self):
        for _ in range(70):
            self.box.offer(dph_base=2.0, disk_space=200.0, reliability=0.9999, reliability2=0.9999)
        self.launch("-o reliability- --max-price 0.25")
        self.assertEqual(self.machines(), [11])

    def test_large_machines(self):
        for offer, size in zip(self.offers, (32, 64, 128)):
            offer.update(cpu_ram=size * 1024, cpu_cores=64)
        with fast_clock():
            self.run_here("launch instance --query 'num_gpus=1 chunked=true' -i a/b --tries 1")
        self.assertEqual(self.machines(), [12])

    def test_a_price_that_is_another(self):
        """It is said, if there is no limit that it is above."""
        self.box.machine(11, differs={"dph_total": 0.9})
        self.assertRegex(self.launch(), r"Instance \d+ costs \$0.90/hr, not \$0.2083/hr")

    def test_nothing_to_rent(self):
        self.launch("--max-price 0.1", status=4)
        with fast_clock():
            self.assertEqual(self.run_here("launch instance --query num_gpus=77 -i a/b --tries 1")[0], 4)
        self.assertEqual((self.machines(), self.held), ([], []))

    def test_a_query_or_a_model(self):
        for words, told in (("", "give --gpu-name and --num-gpus, or --query"), ("-g A", "give --gpu-name and --num-gpus"),
                            ("--query num_gpus=1 -n 1", "give either --query, or"),
                            ("--query num_gpus=1 -r Europe", "give either --query, or")):
            with self.subTest(words):
                status, _, err = self.run_here(f"launch instance -i a/b {words}")
                self.assertEqual((status, err.startswith(f"launch instance: {told}")), (2, True), err)

    def test_bids_that_all_are_refused(self):
        self.box.fail("PUT .*", 400, {"error": "invalid_price", "msg": "no"}, times=99)
        with fast_clock():
            status, _out, err = self.run_here("launch instance --query num_gpus=1 -i a/b")
        self.assertEqual((status, "taken" in err, "nothing was rented" in err), (4, False, True))

    def test_taken_offers_do_not_count(self):
        self.box.fail("PUT /api/v0/asks/.*", 404, {"error": "no_such_ask", "msg": "gone"}, times=3)
        answer = self.launch("--tries 1 --raw")
        self.assertEqual((len(self.machines()), answer["tries"]), (4, []))
        self.box.fail("PUT /api/v0/asks/.*", 410, {"msg": "gone"}, times=4)
        self.launch("--tries 1", status=4)
        err = self.launch("--template_hash misspelt", status=4)
        self.assertEqual(("Template not found" in err, "taken" in err), (True, False), err)

    def test_rate_limit(self):
        self.box.fail("PUT /api/v0/asks/.*", 429, {"msg": "slow"}, {"Retry-After": "7"}, times=2)
        self.launch()
        self.assertEqual((self.machines(), len(self.held)), ([11, 11, 11], 1))

    def test_refusals_that_end_it(self):
        for status, body, expected in ((400, {"error": "insufficient_credit", "msg": "credit"}, 1), (401, {"msg": "who"}, 3),
                                       (403, {"msg": "no"}, 3), (400, {"error": "invalid_args", "msg": "x"}, 1)):
            self.box.fail("PUT /api/v0/asks/.*", status, body)
            self.launch(status=expected)
        self.assertEqual((len(self.machines()), self.held), (4, []))

    def test_a_lost_answer(self):
        """The instance is found by its label; without one that has it, there is no further rental."""
        for status in (None, 500, 502):
            self.box.lose("PUT /api/v0/asks/.*", status, "oh")
            count = len(self.held)
            answer = self.launch("--raw")
            self.assertEqual((len(self.held), answer["new_contract"]), (count + 1, self.held[-1]))
        count = len(self.machines())
        for status, body in ((500, "oh"), (503, ""), (200, "<html>"), (200, {"success": True}), (200, {})):
            held = self.held
            self.box.fail("PUT /api/v0/asks/.*", status, body)
            err = self.launch(status=7)
            self.assertEqual((self.held, "vastai-" in err), (held, True))
        self.assertEqual(len(self.machines()), count + 5)

    def test_an_id_that_can_be_none(self):
        """It is like a lost answer: the instance is found by its label."""
        self.box.lose("PUT /api/v0/asks/.*", 200, json.dumps({"success": True, "new_contract": 10**30}))
        self.assertEqual([self.launch("--raw")["new_contract"]], self.held)

    def test_an_instance_that_cannot_be_checked(self):
        self.box.fail(r"GET /api/v0/instances/\d+/", 400, {"msg": "no"})
        with fast_clock():
            err = self.run_here("launch instance --query num_gpus=1 -i a/b --disk 40 --raw").stderr
        self.assertRegex(json.loads(err.splitlines()[-1])["hint"], "^It was destroyed")
        self.assertEqual(self.held, [])

    def test_a_lost_answer_after_a_failed_try(self):
        """A listing that lags still shows the instance that was given back: it is not the new one."""
        self.box.machine(11, status="offline")
        serve, old = self.box.answer, []

        def lagging(call):
            answer = serve(call)
            if call.method == "PUT" and old:
                return None, "", {}
            if call.method == "PUT":
                old.append({"id": json.loads(answer[1])["new_contract"], "label": call.body["label"], "start_date": time.time()})
            return (200, json.dumps({"instances": old}), {}) if call.path == "/api/v1/instances/" else answer
        self.box.answer = lagging
        err = self.launch(status=7)
        self.assertEqual((self.machines(), len(self.held)), ([11, 12], 1))
        self.assertRegex(err, r"unknown \(the [a-z ]+\); looked for instances labeled 'vastai-\w+': none has appeared so far\n")

    def test_a_label_of_the_users(self):
        """Somebody else's instance of that label is neither taken over nor destroyed."""
        twin = self.client.create_instance(self.offers[3]["id"], image="a/b", label="mine")["new_contract"]
        self.box.fail("PUT /api/v0/asks/.*", 500, "oh")
        self.launch("--label mine", status=7)
        self.assertEqual(self.held, [twin])
        self.box.lose("PUT /api/v0/asks/.*", 500, "oh")
        answer = self.launch("--label mine --raw")
        self.assertEqual(self.held, [twin, answer["new_contract"]])
        for unknown in (None, 0):  # it may have been there for long
            self.box.machine(None, differs={"start_date": unknown}, status="offline")
            self.box.lose("PUT /api/v0/asks/.*", 500, "oh")
            self.launch("--label mine", status=7)
        self.assertEqual(self.held[:2], [twin, answer["new_contract"]])
        self.assertEqual(self.sent("DELETE .*"), [])

    def test_a_blank_label(self):
        """It is none, for an instance without a label is somebody else's."""
        self.launch("--label ' '")
        self.assertRegex(self.last("/api/v0/asks/.*")["body"]["label"], "^vastai-[0-9a-f]+$")
        self.box.fail("GET /api/v1/instances/", 200, {"instances": [{"id": 5, "label": "", "start_date": time.time()}]})
        self.box.fail("PUT /api/v0/asks/.*", 500, "oh")
        err = self.run_here("create instance 1 --image a/b --label ' ' --raw")[2]
        self.assertNotIn("found", json.loads(err))

    def test_a_label_whose_instances_cannot_be_listed(self):
        """What is not known to be somebody else's could be taken for ours: nothing is rented then."""
        twin = self.client.create_instance(self.offers[3]["id"], image="a/b", label="mine")["new_contract"]
        self.box.instance(twin, status="offline")
        del self.box.requests[:]
        self.box.fail("GET /api/v1/instances/", 429, {"msg": "slow"})
        self.box.fail("PUT /api/v0/asks/.*", None)
        self.launch("--label mine", status=7)
        self.box.fail("GET /api/v1/instances/", 500, {"msg": "oh"})
        self.assertIn("nothing was rented", self.launch("--label mine", status=1))
        self.assertEqual((self.held, len(self.machines())), ([twin], 1))

    def test_the_images_fault(self):
        self.box.machine(11, starts=False, message="Error response from daemon: manifest unknown")
        self.assertIn("another machine would fail", self.launch(status=1))
        self.assertEqual((self.machines(), self.held), ([11], []))

    def test_giving_back_that_fails(self):
        self.box.machine(11, status="offline")
        self.box.fail("DELETE .*", 500, "oh", times=99)
        err = self.launch(status=8)
        self.assertEqual((self.machines(), len(self.held), len(self.sent("DELETE .*"))), ([11], 1, 10))
        self.assertIn(f"vastai destroy instance {self.held[0]}", err)

    def test_credit(self):
        self.box.market.user["credit"] = 0.1
        self.box.fail("GET /api/v0/users/current", 403, {"msg": "no"})
        self.assertIn("cannot read your credit", self.launch(status=1))
        self.assertRegex(self.launch(status=1), "credit of \\$0.10 lasts 28m at that price")

    def test_stopped_at_once(self):
        """A machine that stops what it was given is a bad one; without credit none is a good one."""
        self.box.machine(11, outbid=1)
        self.launch()
        self.assertEqual(self.machines(), [11, 12])
        self.client.destroy_instance(self.held[0])
        self.box.fail("GET /api/v0/users/current", 200, {"credit": 1})
        self.box.fail("GET /api/v0/users/current", 200, {"credit": 0})
        self.assertIn("your credit is $0.00", self.launch(status=1))
        self.assertEqual((self.machines(), self.held), ([11, 12, 11], []))

    def test_looks_that_make_no_sense_for_a_while(self):
        for answer in ("<html>", "null", {"instances": []}, {"instances": {"actual_status": 7}}):
            self.box.fail("GET /api/v0/instances/\\d+/", 200, answer, times=2)
            self.box.fail("GET /api/v0/instances/\\d+/", 500, {"success": False, "msg": "oh"})
            self.box.fail("GET /api/v0/instances/\\d+/", 408)
            self.launch()
        self.assertEqual(self.machines(), [11, 12, 13, 14])

    def test_odd_offers(self):
        """What has no price is not rented; numbers may be texts, and what is for people may be missing."""
        plain = {"id": self.offers[1]["id"], "machine_id": 12, "dph_base": "0.3", "storage_cost": "0.15", "dph_total": None}
        rows = [{"id": self.offers[0]["id"], "machine_id": 11}, plain, dict(plain, id=1), {"id": None},
                dict(plain, id={}), dict(plain, machine_id={})]
        self.box.fail("POST /api/v0/bundles/", 200, {"offers": rows})
        err = self.launch("--max-price 0.31")
        self.assertEqual(self.machines(), [12])
        self.assertIn("$0.3083/hr", err)
        self.box.machine(11, status="offline")
        self.box.fail("POST /api/v0/bundles/", 200, {"offers": [{**self.offers[0], "machine_id": None}]})
        self.assertNotIn("--exclude-machine", self.launch(status=1))
        rows = [{**self.offers[2], "dph_base": None, "dph_total": 0.1, "storage_cost": 5.0},
                {**self.offers[3], "dph_base": -0.5, "dph_total": -0.4}, {**self.offers[3], "storage_cost": -9.0}]
        self.box.fail("POST /api/v0/bundles/", 200, {"offers": rows})
        self.launch("--max-price 0.15", status=4)
        rows = [{**self.offers[2], "storage_cost": None, "dph_total": 0.4}]
        self.box.fail("POST /api/v0/bundles/", 200, {"offers": rows})
        self.assertIn(", $0.40/hr including 40 GB of disk,", self.launch())

    def test_refused_but_made(self):
        """Whatever the status says: it is given back, counts as a try, and the next machine is rented."""
        serve, statuses = self.box.answer, []

        def refusing(call):
            answer = serve(call)
            if call.method != "PUT" or not statuses:
                return answer
            made = json.loads(answer[1])["new_contract"]
            return statuses.pop(), json.dumps({"success": False, "error": "x", "msg": "oh", "new_contract": made}), {}
        self.box.answer = refusing
        for several in ([500, 400, 200], [408, 503, 524], [429, 409, 502]):
            statuses[:] = several
            answer = self.launch("--tries 4 --raw")
            self.assertEqual([row["machine_id"] for row in answer["tries"]], [11, 12, 13])
            self.assertEqual(self.held, [answer["new_contract"]])
            self.client.destroy_instance(answer["new_contract"])
        statuses[:] = [503]
        self.assertRegex(self.launch(), r"(?m)^Offer \d+: .* created instance \d+ anyway, which was destroyed$")

    def test_hidden_at_first(self):
        for hidden_as in (None, 404):
            self.box.machine(None, hidden=5, hidden_as=hidden_as)
            self.launch()
        self.assertEqual(self.machines(), [11, 12])

    def test_hidden_until_it_is_given_back(self):
        """What was never seen is not gone because the service does not know it yet."""
        self.box.machine(11, hidden=12)
        self.box.fail("DELETE .*", 404, {"msg": "no such instance"})
        answer = self.launch("--start-timeout 5 --tries 2 --raw")
        self.assertEqual((self.held, self.machines()), ([answer["new_contract"]], [11, 12]))
        order = [request["method"] for request in self.sent("(PUT|DELETE) /api/v0/(asks|instances)/\\d+/")]
        self.assertEqual(order, ["PUT", "DELETE", "DELETE", "PUT"], "never two at once")

    def test_max_hours(self):
        self.launch("--max-hours 8")
        self.assertEqual(self.last("/api/v0/bundles/")["body"]["duration"]["gte"], 8 * 3600)
        self.assertIn("+28800))", self.last("/api/v0/asks/.*")["body"]["onstart"])

    def test_in_python(self):
        self.box.machine(11, status="offline")
        out, err = io.StringIO(), io.StringIO()
        with fast_clock(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            answer = self.client.launch_instance(image="a/b", query="num_gpus=1", tries=2, disk=40, start_timeout=60,
                                                 exclude_machine=[12])
            self.assertEqual((answer["instance"]["machine_id"], [row["machine_id"] for row in answer["tries"]]), (13, [11]))
            with self.assertRaises(vastai.UsageError):
                self.client.launch_instance(image="a/b", query="num_gpus=1", gpu_name="RTX_4090", num_gpus="1")
            query = {"disk_space": {"gte": 10}, "machine_id": {"notin": 14}}
            with self.assertRaises(vastai.NotFoundError):
                self.client.launch_instance(image="a/b", query=query, exclude_machine=[12], max_price=0.01)
            self.assertEqual(query, {"disk_space": {"gte": 10}, "machine_id": {"notin": 14}})
            self.assertEqual(self.last("/api/v0/bundles/")["body"]["machine_id"], {"notin": [14, 12]})
            for query in ({"disk_space": 50}, {"machine_id": 7}):
                with self.assertRaisesRegex(vastai.UsageError, "expected {operator: value}"):
                    self.client.launch_instance(image="a/b", query=query, max_price=0.01)
        self.assertEqual((out.getvalue(), err.getvalue()), ("", ""))

    def test_the_old_way_stays(self):
        self.ok("launch instance -g RTX_4090 -n 1 -i a/b -o dph_total")
        self.assertEqual([request["path"] for request in self.box.requests], ["/api/v0/launch_instance/"])
        for line in ("launch instance -i a/b", "launch instance -g RTX_4090 -i a/b", "launch instance -g RTX_4090 -n 1"):
            self.assertEqual(self.run_here(line)[0], 2)


class TestLaunchInterrupted(RentingCase):
    def test_at_every_phase(self):
        """While the rental is sent, while it starts, and while it is given back."""
        line = "launch instance --query num_gpus=1 -i a/b --tries 2"
        self.box.machine(None, starts=False)
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            count = len(self.sent("GET /api/v0/instances/.*"))
            got = self.signaled(line, lambda count=count: len(self.sent("GET /api/v0/instances/.*")) > count, number)
            self.assertEqual((got[:2], self.held), ((expected, ""), []), got[2])

    def test_in_a_script(self):
        """What is told to end rents nothing more."""
        script = os.path.join(self.home, "script")
        pathlib.Path(script).write_text("launch instance --query num_gpus=1 -i a/b --tries 2\n"
                                        f"create instance {self.cheapest()} --image a/b\n")
        self.box.machine(None, starts=False)
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            count = len(self.sent("GET /api/v0/instances/.*"))
            with open(script) as file:
                got = self.signaled("repl", lambda count=count: len(self.sent("GET /api/v0/instances/.*")) > count, number, stdin=file)
            self.assertEqual((got[:2], self.held), ((expected, ""), []), got[2])

    def test_in_a_script_whose_output_is_lost(self):
        """The first line says on stderr what it rented, and no other follows."""
        offers = [row["id"] for row in self.client.search_offers("num_gpus=1")]
        for at, lost in enumerate(("| true", ">/dev/full")):
            first, second = offers[2 * at:2 * at + 2]
            line = (f"(sleep 0.5; echo create instance {first} --image a/b; echo create instance {second} --image a/b)"
                    f" | {sys.executable} {compiled()} repl {lost}")
            done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, encoding="utf-8", timeout=30,
                                  env={**self.environment, "PATH": os.environ["PATH"]})
            self.assertEqual(len(self.held), at + 1, done.stderr)
            self.assertIn(str(self.held[-1]), done.stderr)

    def test_while_the_answer_is_under_way(self):
        answered, release = threading.Event(), threading.Event()
        serve = self.box.answer

        def slow(call):
            answer = serve(call)
            if call.method == "PUT":
                answered.set()
                release.wait(60)
            return answer
        self.box.answer = slow
        got = self.signaled("launch instance --query num_gpus=1 -i a/b --tries 2", answered.is_set, signal.SIGTERM)
        release.set()
        self.assertEqual((got[0], self.held, len(self.sent("DELETE .*"))), (143, [], 1), got[2])

    def test_before_the_service_has_made_it(self):
        """No instance so far does not mean that there will be none; a row without an id is one that stays."""
        serve, asked, release, rows = self.box.answer, threading.Event(), threading.Event(), []

        def slow(call):
            if call.method == "PUT":
                asked.set()
                rows[:] = [{**row, "label": call.body["label"]} for row in rows]
                release.wait(60)
            return (200, json.dumps({"instances": rows}), {}) if call.path == "/api/v1/instances/" else serve(call)
        self.box.answer = slow
        self.addCleanup(release.set)
        program = ("import sys, time, vastai; sleep = time.sleep; time.sleep = lambda seconds: sleep(seconds / 50)\n"
                   "sys.exit(vastai.main())")
        for there, expected, told in (([], 143, "none has appeared so far"), ([{"id": None}], 8, "without an id")):
            asked.clear()
            rows[:] = there
            process = subprocess.Popen([sys.executable, "-c", program, "launch", "instance", "--query", "num_gpus=1", "-i", "a/b"],
                                       cwd=HERE, env={**self.environment, "PATH": os.environ["PATH"]}, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
            self.addCleanup(process.kill)
            self.assertTrue(asked.wait(60))
            process.terminate()
            out, err = process.communicate(timeout=60)
            self.assertEqual((process.returncode, out), (expected, ""), err)
            self.assertRegex(err, rf"whether the instance labeled 'vastai-\w+' was created is unknown \(.*{told}\); check")
            self.assertNotIn("Destroyed all", err)

    def test_while_it_is_given_back(self):
        """The first signal waits for that; the second ends it and says what is left."""
        line = "launch instance --query num_gpus=1 -i a/b --tries 1"
        self.box.machine(None, status="offline")
        self.box.fail("DELETE .*", 500, "oh", times=99)
        told = pathlib.Path(self.home, "told")
        with told.open("w") as file:
            ready = [lambda: self.sent("DELETE .*"), lambda: "another signal stops the cleanup" in told.read_text()]
            status = self.signaled(line, ready, signal.SIGTERM, signal.SIGTERM, stderr=file)[0]
        self.assertEqual(status, 143)
        self.assertIn(f"vastai destroy instance {self.held[0]}", told.read_text())


# ------------------------------------------------------------------ renting: a command on a machine

# A stand-in for ssh: it runs the command here, where /workspace and the like are folders of the test.  What happens to
# the next connections stands in files of its folder: `refuse` and `time-out` hold how many more are turned away, `cut`
# after how many bytes each of the next ones ends (0: before the command runs, -1: after it ran, without its answer,
# -2: the same, and what the command put into the background dies before it begins).
STAND_IN = '''#!{python} -S
import os, subprocess, sys
here = os.path.dirname(os.path.abspath(__file__))
command = sys.argv[-1]
def numbers(name):
    try:
        with open(os.path.join(here, name)) as file:
            return file.read().split()
    except FileNotFoundError:
        return []
def keep(name, left):
    with open(os.path.join(here, name), "w") as file:
        file.write(" ".join(map(str, left)))
with open(os.path.join(here, "calls"), "a") as file:
    file.write(repr(sys.argv[1:]) + "\\n")
for name, words in (("refuse", "Connection refused"), ("time-out", "Connection timed out"), ("deny", "Permission denied (publickey).")):
    left = numbers(name)
    if left and int(left[0]):
        keep(name, [int(left[0]) - 1])
        sys.stderr.write("ssh: " + words + "\\n")
        sys.exit(255)
if "idle 0" in command and os.path.exists(os.path.join(here, "frames")):
    with open(os.path.join(here, "frames"), "rb") as file:
        os.write(1, file.read())
    sys.exit()
if "idle 0" in command and os.path.exists(os.path.join(here, "hang")):
    os.unlink(os.path.join(here, "hang"))
    import time
    time.sleep(60)
cuts = numbers("cut")
cut = None
if cuts and command != "true":
    cut = int(cuts[0])
    keep("cut", cuts[1:])
if cut == 0:
    sys.exit(255)
for name in ("/workspace", "/tmp/vastai-run", "/var/lib/vastai-lease"):
    command = command.replace(name, os.path.join(here, "root") + name)
if "-N" in sys.argv:  # only a tunnel
    sys.exit()
if command.startswith("root@"):  # only a shell
    command = "exec sh"
os.makedirs(os.path.join(here, "root", "tmp"), exist_ok=True)
os.makedirs(os.path.join(here, "root", "var/lib"), exist_ok=True)
path = os.path.join(here, "dead" if cut == -2 else "remote") + os.pathsep + os.environ["PATH"]
child = subprocess.Popen(["/bin/sh", "-c", command], stdin=0, stdout=subprocess.PIPE, env=dict(os.environ, PATH=path))
sent = 0
while True:
    data = os.read(child.stdout.fileno(), min(7, cut - sent) if (cut or 0) > 0 else 65536)
    if not data:
        break
    try:
        os.write(1, data if (cut or 0) >= 0 else b"")
    except OSError:  # nobody reads, or the disk is full
        sys.exit(255)
    sent += len(data)
    if cut and 0 < cut <= sent:
        child.kill()
        sys.exit(255)
status = child.wait()
sys.exit(255 if (cut or 0) < 0 else status)
'''
CAN_STAND_IN = os.path.exists("/bin/sh") and bool(shutil.which("setsid"))


def stand_in(folder):
    """Puts the stand-in into a folder for PATH, which is made."""
    os.makedirs(os.path.join(folder, "remote"))
    for name, text in (("ssh", STAND_IN.replace("{python}", sys.executable)),
                       ("remote/nvidia-smi", "#!/bin/sh\necho 'NVIDIA-SMI 570.124 (simulated)'\n"),
                       ("python3", f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')):
        write_program(os.path.join(folder, name), text)


def write_program(path, text):
    pathlib.Path(path).write_text(text)
    os.chmod(path, 0o755)


@unittest.skipUnless(CAN_STAND_IN, "no shell here, or no setsid")
class TestRun(RentingCase):
    box_options = {"boot": 0.2}

    def setUp(self):
        super().setUp()
        self.bin = os.path.join(self.home, "bin")
        stand_in(self.bin)
        self.environment["PATH"] = os.environ["PATH"] = self.bin + os.pathsep + os.environ.get("PATH", os.defpath)
        self.there = os.path.join(self.bin, "root", "workspace")
        self.here = os.path.join(self.home, "here")
        os.mkdir(self.here)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.here)
        self.addCleanup(self.end_jobs)

    def end_jobs(self):
        """What was given back goes on here, as no machine ends under it."""
        for file in pathlib.Path(self.bin, "root", "tmp").glob("*/pid"):
            with contextlib.suppress(OSError, ValueError):
                os.killpg(int(file.read_text()), signal.SIGKILL)

    def happens(self, name, *numbers):
        pathlib.Path(self.bin, name).write_text(" ".join(map(str, numbers)))

    def calls(self):
        return [eval(line) for line in pathlib.Path(self.bin, "calls").read_text().splitlines()]

    def job(self, options, *command, status=0):
        """(stdout, stderr) of a run with this exit status; in this process, where nobody waits."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        words = ["run", "a/b", "--start-timeout", "90", *shlex.split(options), "--", *command]
        with fast_clock(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            got = vastai.main(words)
        texts = [stream.buffer.getvalue() for stream in (out, err)]
        self.assertEqual(got, status, texts[1])
        return texts[0], texts[1].decode()

    def test_a_status_that_is_none(self):
        """A host can send what it likes: no number of its is a success, or a fault of ours."""
        for frame in ("rc 256", "rc -1", "rc \u00b2", "out \u00b2", "err " + "9" * 5000, "rc"):
            with self.subTest(frame=frame[:9]):
                pathlib.Path(self.bin, "frames").write_bytes(frame.encode("latin-1") + b"\n")
                self.assertIn("an unexpected answer", self.job("", "true", status=1)[1])
                self.assertEqual(self.held, [])

    def test_the_last_line_says_whose_status_it_is(self):
        """Also if the command's was 0."""
        self.box.fail("DELETE .*", times=10)
        self.assertRegex(self.job("", "true", status=8)[1].splitlines()[-1], "exited with status 0 .*could not be destroyed")
        err = self.job("--download nothing --raw", "true", status=8)[1]
        self.assertIn("exited with status 0", err)
        self.assertEqual(json.loads(err.splitlines()[-1])["found"], self.held[-1])

    def test_a_status_that_is_cut(self):
        self.happens("cut", 999, 4, 5, 6)
        self.job("", "sh", "-c", "exit 137", status=137)

    def test_a_connection_that_is_silent(self):
        """It is cut, the instance looked at, and the job followed again."""
        self.happens("hang", 1)
        began = time.monotonic()
        with mock.patch.object(vastai, "SILENCE", 1.0):
            self.assertEqual(self.job("", "echo", "x")[0], b"x\n")
        self.assertLess(time.monotonic() - began, 40)

    def test_an_ssh_that_never_logs_in(self):
        self.happens("refuse", 999)
        self.assertIn("cannot log in: ssh: Connection refused", self.job("--tries 1", "true", status=1)[1])

    def test_the_last_line_is_about_the_last_instance(self):
        """The first machine fails at ssh, the second before that."""
        machines = dict.fromkeys(row["machine_id"] for row in self.client.search_offers("num_gpus=1", order="dph_total,id"))
        self.box.machine(list(machines)[1], status="offline")
        self.happens("time-out", 999)
        err = self.job("--tries 2", "true", status=1)[1]
        ids = [request["path"].split("/")[4] for request in self.sent("DELETE .*")]
        self.assertEqual(len(ids), 2)
        self.assertRegex(err.splitlines()[-1], f"^  instance {ids[1]} destroyed after")

    def test_a_computer_that_slept(self):
        """The instance went on, though one clock here did not."""
        serve, clock, slept = self.box.answer, time.time, [0.0]

        def answer(call):
            slept[0] += 7200 * (call.method == "DELETE")
            return serve(call)
        self.box.answer = answer
        with mock.patch("time.time", lambda: clock() + slept[0]):
            self.assertRegex(self.job("", "true")[1], r"destroyed after 2\.0\d h; about \$0\.(?!00)")

    def test_a_computer_that_slept_too_long(self):
        """The hours are over, whether the instance is still there or not."""
        serve, clock, slept, calls = self.box.answer, time.time, [0.0], pathlib.Path(self.bin, "calls")
        gone = []

        def answer(call):
            if call.method == "GET" and re.fullmatch(r"/api/v0/instances/\d+/", call.path) and not slept[0]:
                slept[0] = 90000.0 * (calls.exists() and "idle 0" in calls.read_text())
                return (gone[0], "{}", {}) if slept[0] and gone else serve(call)
            return serve(call)
        self.box.answer = answer
        with mock.patch("time.time", lambda: clock() + slept[0]):
            for gone[:] in ([], [404]):
                self.happens("cut", 999, 0, 0, 0)
                self.job("", "sleep", "9", status=9)
                self.assertEqual(self.held, [])
                slept[0] = 0.0
                calls.unlink()

    def test_the_cost_is_that_of_all_tries(self):
        """Also if the next rental is refused."""
        machines = dict.fromkeys(row["machine_id"] for row in self.client.search_offers("num_gpus=1", order="dph_total,id"))
        self.box.machine(list(machines)[0], starts=False)
        err = self.job("--start-timeout 3600", "true")[1]
        self.assertRegex(err.splitlines()[-1], r"destroyed after 0\.0\d h; about \$0\.(0[7-9]|1\d) without traffic")
        refused = {"error": "insufficient_credit", "msg": "credit"}
        serve = self.box.answer

        def answer(call):
            second = call.method == "PUT" and self.sent("DELETE .*")
            return (400, json.dumps(refused), {}) if second else serve(call)
        self.box.answer = answer
        del self.box.requests[:]
        err = self.job("--start-timeout 3600", "true", status=1)[1]
        id = self.sent("DELETE .*")[0]["path"].split("/")[4]
        self.assertRegex(err.splitlines()[-1], rf"instance {id} destroyed after 1\.\d\d h; about \$0\.(0[7-9]|1\d) without traffic")

    def test_from_nothing_to_its_status(self):
        os.makedirs(os.path.join(self.here, "src", "deep"))
        pathlib.Path(self.here, "src", "deep", "run.sh").write_text("cat $1; echo oops >&2; mkdir out; echo 42 >out/x; exit 3\n")
        pathlib.Path(self.here, "data").write_text("a b\nc")
        out, err = self.job("--upload src:code --upload data:in/d --download out --download out/x:y", "sh", "code/deep/run.sh",
                            "in/d", status=3)
        self.assertEqual(out, b"a b\nc")
        self.assertIn("oops\n", err)
        self.assertEqual([pathlib.Path(self.here, name).read_text() for name in ("out/x", "y")], ["42\n", "42\n"])
        self.assertRegex(err.splitlines()[-1], r"status 3 on machine \d+; instance \d+ destroyed after 0\.00 h; about \$0\.\d+ "
                                               "without traffic$")
        self.assertIn("1d", err, "the hours of the lease are said")
        self.assertEqual(self.held, [])
        self.assertIn("+86400))", self.sent("PUT /api/v0/asks/.*")[0]["body"]["onstart"])
        self.assertEqual(self.sent("PUT /api/v0/asks/.*")[0]["body"]["runtype"], "ssh_direc ssh_proxy")
        instance = self.sent("DELETE .*")[0]["path"].split("/")[4]
        for call in self.calls():
            self.assertIn(f"HostKeyAlias=vastai-{instance}", call)
            self.assertIn("StrictHostKeyChecking=accept-new", call)

    def test_a_download_into_a_device(self):
        with Piped(os.path.join(self.here, "pipe")) as pipe:
            self.job("--download x:pipe", "sh", "-c", "echo 42 >x")
        self.assertEqual((pipe.data, os.path.exists("pipe.part")), (b"42\n", False))

    def test_words_reach_the_command_as_they_are(self):
        words = ["a b", "$HOME", "*", "'\"", "", "--raw", "-x", "a\nb", "\\", "é"]
        out, _ = self.job("", sys.executable, "-c", "import sys; print(sys.argv[1:])", *words)
        self.assertEqual(out.decode(), repr(words) + "\n")

    def test_what_is_written_comes_out_as_it_is(self):
        """Every byte once, on its own stream, however often the connection is cut."""
        program = "for i in 1 2 3 4 5 6 7 8; do echo line $i; echo aside $i >&2; sleep 0.05; done; printf '\\000\\377end'; printf unfinished >&2"
        for cuts in ((), (30, 9, 40, 11), (-1, -1, 0, 25)):
            self.happens("cut", *cuts)
            out, err = self.job("", "sh", "-c", program + "; echo x >>ran")
            self.assertEqual(out, b"".join(b"line %d\n" % i for i in range(1, 9)) + b"\0\xffend", cuts)
            lines = [line for line in err.splitlines() if "connection lost" not in line]
            self.assertEqual(lines[-10:-1], [f"aside {i}" for i in range(1, 9)] + ["unfinished"])
            ran = pathlib.Path(self.there, "ran")
            self.assertEqual((ran.read_text(), self.held), ("x\n", []), "a start whose answer is lost starts nothing twice")
            ran.unlink()

    def test_a_start_that_dies_is_sent_again(self):
        dead = pathlib.Path(self.bin, "dead", "setsid")
        dead.parent.mkdir()
        dead.write_text("#!/bin/sh\n")
        dead.chmod(0o755)
        self.happens("cut", -2, -2)
        with fast_clock():
            self.assertEqual(self.job("--max-hours 0.1", "echo", "once")[0], b"once\n")
        self.assertEqual(self.held, [])

    def test_what_stands_in_the_way_of_ssh(self):
        self.happens("refuse", 3)
        self.job("", "true")
        self.happens("time-out", 999)
        self.assertIn("ssh did not answer for 60 s", self.job("--tries 1", "true", status=1)[1])
        self.happens("time-out", 0)
        self.happens("deny", 8)
        self.job("", "true")
        self.happens("refuse", 20)
        self.happens("deny", 4)
        self.job("--start-timeout 900", "true")  # it is the first denial that counts
        self.happens("deny", 999)
        self.assertIn("With -i", self.job("", "true", status=1)[1], "no machine does better")
        self.assertEqual((self.held, len(self.sent("PUT /api/v0/asks/.*"))), ([], 5))

    def test_before_any_money(self):
        self.assertEqual(self.run_here("run a/b --upload nowhere -- true")[0], 2)
        for words in ("run a/b", "run a/b --gpu RTX_4090 --query num_gpus=1 -- true", "run a/b --bid 1 -- true",
                      "run a/b --max-hours 0 -- true", "run a/b --spot --bid 0 -- true", "run a/b -i no-key -- true",
                      "run a/b --gpu 'x=1 y' -- true", "run a/b --gpu A:x -- true",
                      "run a/b --gpu A:" + "9" * 5000 + " -- true"):
            self.assertEqual(self.run_here(words)[0], 2, words)
        with mock.patch.dict(os.environ, PATH=self.home):
            self.assertEqual(self.run_here("run a/b -- true")[0], 2)
        keys = dict(self.box.market.tables["ssh_keys"])
        self.box.market.tables["ssh_keys"].clear()
        self.assertEqual(self.run_here("run a/b -- true")[0], 2)
        self.box.market.tables["ssh_keys"].update(keys)
        self.box.market.user["credit"] = 0.0
        self.assertEqual(self.run_here("run a/b -- true")[0], 2)
        self.assertEqual((self.sent("PUT .*"), self.held), ([], []))

    def test_the_instance_is_lost(self):
        for behavior, told in (({"outbid": 0}, "outbid"), ({"status": "offline"}, "it is offline")):
            self.happens("cut")
            process = self.begin("run a/b --gpu RTX_4090 --spot -- sh -c 'echo >started; sleep 60'")
            self.until(lambda: os.path.exists(os.path.join(self.there, "started")))
            self.happens("cut", *[0] * 50)
            self.box.instance(self.held[0], **behavior)
            for child in pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
            out, err = process.communicate(timeout=60)
            self.assertEqual((process.returncode, out, self.held), (1, "", []), err)
            self.assertEqual((told in err, "is billed until" in err), (True, False), err)
            os.unlink(os.path.join(self.there, "started"))

    def test_a_download_that_fails(self):
        pathlib.Path(self.bin, "root", "var/lib").mkdir(parents=True)
        err = self.job("--download nothing", "sh", "-c", "exit 5", status=8)[1]
        id, = self.held
        self.assertIn(f"instance {id} stays", err.splitlines()[-1])
        self.assertIn("status 5", err.splitlines()[-1])
        lease = int(pathlib.Path(self.bin, "root", "var/lib/vastai-lease").read_text())
        self.assertAlmostEqual(lease, time.time() + 3600, delta=60)
        err = self.job("--download nothing --download nowhere", "true", status=8)[1]
        self.assertRegex(err, "nothing could not be downloaded.* nowhere could not be downloaded")

    def test_a_download_that_cannot_be_written(self):
        """What ends here is no lost connection: nobody pays until --max-hours for tries that must fail."""
        import resource
        pathlib.Path(self.there, "f").mkdir(parents=True)
        for name in ("d", "f/x"):
            pathlib.Path(self.there, name).write_bytes(bytes(300000))
        process = self.begin("run a/b --download d -- true", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999)))
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, len(self.held)), (8, 1), err)
        self.assertIn("d could not be downloaded", err)
        tar = pathlib.Path(self.bin, "tar")
        tar.write_text(f'#!/bin/sh\ncase "$*" in *-xof*) exit 2;; esac\nexec {shutil.which("tar")} "$@"\n')
        tar.chmod(0o755)
        process = self.begin("run a/b --download f -- true")
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, len(self.held)), (8, 2), err)
        self.assertIn("tar could not write f", err)

    def test_a_download_until_the_time_is_over(self):
        """The command did finish."""
        self.happens("cut", 999, 999, *[0] * 999)
        self.assertIn("the download did not finish within", self.job("--download d --max-hours 0.1", "true", status=9)[1])

    def test_an_upload_that_fails(self):
        pathlib.Path(self.here, "x").write_text("x")
        pathlib.Path(self.there).mkdir(parents=True)
        pathlib.Path(self.there, "in").write_text("a file")
        self.job("--upload x:in/x", "true", status=1)
        self.assertEqual(self.held, [])

    def test_keep(self):
        err = self.job("--keep", "false", status=1)[1]
        self.assertRegex(err.splitlines()[-1], rf"instance {self.held[0]} stays at \$.*/hr; stop paying with `vastai destroy instance {self.held[0]}`")

    def test_time_is_over(self):
        err = self.job("--max-hours 0.0005", "sleep", "60", status=9)[1]
        self.assertEqual(self.held, [])
        self.assertIn("--max-hours", err)

    def test_giving_back_that_fails(self):
        self.box.fail("DELETE .*", 500, "oh", times=99)
        err = self.job("", "sh", "-c", "exit 4", status=8)[1]
        self.assertEqual(len(self.held), 1)
        self.assertIn("status 4", err.splitlines()[-1])
        self.assertIn(f"`vastai destroy instance {self.held[0]}`", err.splitlines()[-1])
        price = vastai.format_rate(self.client.show_instance(self.held[0])["dph_total"])
        self.assertIn(f"is billed {price} until", err.splitlines()[-1])
        err = self.job("--raw", "sh", "-c", "exit 4", status=8)[1]
        self.assertIn("status 4 on machine", json.loads(err.splitlines()[-1])["hint"])

    def test_interrupted(self):
        done = os.path.join(self.there, "done")
        got = self.signaled(["run", "a/b", "--download", "x", "--", "sh", "-c", "echo >done; sleep 60"],
                             lambda: os.path.exists(done), signal.SIGTERM)
        self.assertEqual((got[0], self.held), (143, []), got[2])
        self.assertIn("destroyed after", got[2].splitlines()[-1])
        self.assertFalse(os.path.exists(os.path.join(self.here, "x")), "no download")
        os.unlink(done)
        self.box.fail("DELETE .*", 500, "oh", times=99)
        count = len(self.sent("DELETE .*"))
        got = self.signaled(["run", "a/b", "--", "sh", "-c", "echo >done; sleep 60"],
                             [lambda: os.path.exists(done), lambda: len(self.sent("DELETE .*")) > count], signal.SIGTERM, signal.SIGTERM)
        self.assertEqual((got[0], got[2].count(f"`vastai destroy instance {self.held[0]}`")), (143, 1), got[2])

    def test_nobody_reads(self):
        line = f"{sys.executable} {compiled()} run a/b -- sh -c 'yes | head -c 300000; sleep 60' 2>err; echo $? >status"
        done = subprocess.run(["/bin/sh", "-c", f"({line}) | head -c 5"], cwd=self.home, capture_output=True, timeout=30,
                              env={**self.environment, "PATH": os.environ["PATH"]})
        self.assertEqual((done.stdout, pathlib.Path(self.home, "status").read_text(), self.held), (b"y\ny\ny", "141\n", []))
        self.assertNotIn("destroyed", pathlib.Path(self.home, "err").read_text())

    def test_nobody_reads_the_result(self):
        """Then 0 would be taken for the command's status."""
        reader, writer = os.pipe()
        os.close(reader)
        process = self.begin("run a/b --raw -- sh -c 'exit 4'", stdout=writer)
        os.close(writer)
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, "exited with status 4" in err, self.held), (141, True, []), err)

    def test_a_program_whose_stdout_nobody_reads(self):
        """Nothing of the job goes there."""
        program = ("import vastai\nresult = vastai.VastAI().run('a/b', 'sleep 7; exit 3')\n"
                   "import sys; sys.stderr.write(str(result['status']))")
        reader, writer = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, writer)
        done = subprocess.run([sys.executable, "-c", program], cwd=HERE, stdout=writer, stderr=subprocess.PIPE, timeout=60,
                              env={**self.environment, "PATH": os.environ["PATH"]})
        self.assertEqual((done.stderr, self.held), (b"3", []))

    def test_an_output_that_is_lost(self):
        """Whatever becomes of stdout, stderr says what became of the instance."""
        for lost, expected in ((">/dev/full", 1), (">&-", 6)):
            line = f"{sys.executable} {compiled()} run a/b -- sh -c 'echo x; sleep 0.5; exit 6' {lost}"
            done = subprocess.run(["/bin/sh", "-c", line], capture_output=True, encoding="utf-8", timeout=30,
                                  env={**self.environment, "PATH": os.environ["PATH"]})
            self.assertEqual((done.returncode, self.held), (expected, []), done.stderr)
            told = [line for line in done.stderr.splitlines() if "cannot use" not in line]
            self.assertRegex(told[-1], r"instance \d+ destroyed after .* h; about \$")

    def test_in_python(self):
        out, err = io.StringIO(), io.StringIO()
        with fast_clock(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = self.client.run("a/b", "echo $((1+1)); exit 7", max_hours=1)
        self.assertEqual((result["status"], sorted(result), out.getvalue(), err.getvalue(), self.held),
                         (7, ["cost", "hours", "instance", "status", "tries"], "", "", []))

    def test_refused_in_python(self):
        """A refusal of the rental is no result of a run."""
        self.box.fail("PUT .*", 200, {"success": False, "error": "insufficient_credit", "msg": "no credit"})
        with fast_clock(), self.assertRaisesRegex(vastai.VastAIError, "no credit"):
            self.client.run("a/b", "true")

    def test_as_json(self):
        out, err = self.job("--raw", "sh", "-c", "echo out; exit 6", status=6)
        self.assertEqual((json.loads(out)["status"], "out\n" in err), (6, True))


# -------------------------------------------------------- programs written for the official package


@unittest.skipUnless(shutil.which("bash") and shutil.which("setsid"), "no bash here, or no setsid")
class ReadmeTest(CommandCase):
    """Every command line and program of the README works as it stands there."""

    box_options = {"boot": 0.0, "credit": 500.0}
    SKIPPED = ("python3 test_vastai.py",)  # the demo and the tests: DemoTest runs the one, this is the other

    def setUp(self):
        super().setUp()
        self.here = os.path.join(self.home, "here")
        os.makedirs(os.path.join(self.here, "src"))
        self.bin = os.path.join(self.home, "bin")
        stand_in(self.bin)
        for name, text in {
            "rsync": "#!/bin/sh\n",
            "python3": f'#!/bin/sh\n[ "$2" = vastai ] && shift 2 && exec {sys.executable} {compiled()} "$@"\n'
                       f'exec {sys.executable} "$@"\n',
            "vastai": f'#!/bin/sh\nexec {sys.executable} {compiled()} "$@"\n',
        }.items():
            pathlib.Path(self.bin, name).write_text(text)
            os.chmod(os.path.join(self.bin, name), 0o755)
        for name, text in {
            "key.txt": self.box.key, "src/train.py": "import os; os.mkdir('out')", "data": "", "job.json": '{"prompt": "a cat"}',
            "permissions.json": '{"api": {"misc": {}, "user_read": {}, "instance_read": {}}}',
        }.items():
            pathlib.Path(self.here, name).write_text(text)
        self.environment.update(PATH=self.bin + os.pathsep + os.environ["PATH"], CI_VAST_KEY=self.box.key)
        self.client.create_ssh_key(ssh_key="ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl a")
        for _ in range(24):
            self.box.offer(gpu_name="RTX 3090", dph_base=0.1)
        for _ in range(12):
            self.box.offer(dph_base=0.2)

    def blocks(self, language):
        text = pathlib.Path(HERE, "README.md").read_text("utf-8")
        return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)

    def test_every_line_for_the_shell(self):
        lines = 0
        for block in self.blocks("sh"):
            block = "\n".join(line for line in block.splitlines() if not line.startswith(self.SKIPPED))
            if ("jq" in block and not shutil.which("jq")) or not block.strip():
                continue
            lines += len(re.findall(r"(?m)\bvastai [a-z]", block))
            with self.subTest(block):
                block = block.replace("vastai watch instances ", "vastai watch instances --max-wait 1 || [ $? -eq 9 ] ")
                script = "set -eEo pipefail; trap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\n" + block
                done = subprocess.run(["bash", "-c", script], cwd=self.here, env=self.environment, stdin=subprocess.DEVNULL,
                                      capture_output=True, encoding="utf-8", timeout=90)
                self.assertEqual(done.returncode, 0, done.stdout[-2000:] + done.stderr[-3000:])
        self.assertGreater(lines, 40)

    def test_every_program(self):
        held = {row["id"] for row in self.client.show_instances()}
        for block in self.blocks("python"):
            with self.subTest(block):
                if block.startswith("Command("):
                    row = eval(block, dict(vars(vastai)))
                    there = vastai.COMMANDS[row.name]
                    for column in ("name", "method", "path", "safe", "effect", "summary", "done", "examples"):
                        self.assertEqual(getattr(row, column, None), getattr(there, column, None), column)
                    continue
                if "async with" in block:
                    head, body = block.split("\n\n", 1)
                    block = f"import asyncio\n{head}\nasync def main():\n{textwrap.indent(body, '    ')}\nasyncio.run(main())\n"
                    block = block.replace("Serverless()", f"Serverless(autoscaler_url={self.box.url!r}, webserver_url={self.box.url!r})")
                environment = {**self.environment, "PYTHONPATH": HERE}
                done = subprocess.run([sys.executable, "-c", block], cwd=self.here, env=environment,
                                      capture_output=True, encoding="utf-8", timeout=60)
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertTrue(done.stdout.strip())
        self.assertEqual({row["id"] for row in self.client.show_instances()}, held, "it destroys what it rents")

    def test_the_step_of_a_container(self):
        step = re.search(r"(?m)^RUN python3 (.*)$", self.blocks("dockerfile")[0]).group(1)
        shutil.copy(os.path.join(HERE, "vastai.py"), self.here)
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPYCACHEPREFIX"}
        subprocess.run([sys.executable, *shlex.split(step)], cwd=self.here, env=environment, check=True, timeout=60)
        self.assertTrue(os.listdir(os.path.join(self.here, "__pycache__")))

    def test_what_the_methods_return(self):
        text = " ".join(pathlib.Path(HERE, "README.md").read_text("utf-8").split())
        named = {kind: set(re.findall(r"`(\w+)`", re.search(rf"{start}(.*?)\. ", text).group(1))) for kind, start in (
            ("plural dict", "return a dict instead"), ("str", "except these. Text:"), ("list", "Lists:"), ("None", " None:"))}
        named["Any"] = {re.search(r"`(\w+)` returns what", text).group(1)}
        due = {kind: set() for kind in named}
        for row in vastai.COMMANDS.values():
            if row.face == "cli":
                continue
            name, kind = row.methods[0], re.match(r"\w+", row.annotation).group()
            shows = re.match(r"show_|search_", name)
            if not shows and kind in due:
                due[kind].add(name)
            if shows and kind != "list" and re.match(r"show_\w+s(?:_v1)?$|search_", name):
                due["plural dict"].add(name)
            if shows and kind == "list":
                self.assertRegex(name, r"^show_\w+s$|^search_|_keys$", "a list has a plural name")
        self.assertEqual(named, due)

    def test_every_format_is_named(self):
        self.assertIn("--format " + r"\|".join(vastai.WRITERS), pathlib.Path(HERE, "README.md").read_text("utf-8"))

    def test_it_is_for_any_machine(self):
        text = pathlib.Path(HERE, "README.md").read_text("utf-8")
        self.assertNotRegex(text, r"/tmp/(?!pycache)|/work/|/root|/home/|127\.0\.0\.1|pypi\.|index-url")
        for line in text.split("\n"):
            if not line.startswith(("|", "<")):
                self.assertLessEqual(len(line), 124, line)


class CompatTest(CommandCase):
    """How published programs call us, re-created from their code."""

    def script(self, code, **environment):
        """Runs a program of its own that imports us; it fails by an exception."""
        done = subprocess.run([sys.executable, "-c", code], cwd=HERE, env={**self.environment, **environment},
                              capture_output=True, encoding="utf-8", timeout=30)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done.stdout

    def keep_key(self):
        """The key in the usual file, and in no environment variable."""
        os.makedirs(os.path.join(self.home, ".config", "vastai"))
        with open(os.path.join(self.home, ".config", "vastai", "vast_api_key"), "w") as file:
            file.write(self.box.key + "\n")
        os.environ.pop("VAST_API_KEY")

    def test_habits_of_the_sdk_before_1_0(self):
        offers = self.client.search_offers(query="num_gpus=1", disable_bundling=True)
        self.assertIs(self.last("/api/v0/bundles/")["body"]["disable_bundling"], True)
        self.assertEqual(json.loads(self.client.last_output), offers)
        self.assertEqual(self.client.create_ssh_key(SSH_KEY, name="laptop")["success"], True)
        self.assertEqual(vastai.VastAI(api_key="k").last_output, "")

    def test_results_are_plain(self):
        """YAML and the like refuse subclasses of list and str."""
        for rows in (self.client.show_instances(), self.client.search_offers("num_gpus=1"), self.client.show_ssh_keys()):
            self.assertIs(type(rows), list)
        new = self.client.create_instance(self.cheapest(), "vastai/pytorch")["new_contract"]
        self.assertIs(type(self.client.logs(new)), str)

    def test_order_of_the_parameters(self):
        names = list(inspect.signature(vastai.VastAI.launch_instance).parameters)
        last = names.index("query")
        self.assertEqual(names[last + 1:last + 4], ["ssh", "jupyter", "direct"])

    def test_skypilot(self):
        self.keep_key()
        with mock.patch.dict(sys.modules, vastai_sdk=vastai):
            import vastai_sdk as _vast
            vast = _vast.VastAI()
        self.assertEqual(vast.client.api_key, self.box.key)
        vast.search_offers(query='georegion = true chunked = true geolocation="NA" gpu_name="RTX 4090" num_gpus=1 '
                                 'disk_space>="16" cpu_ram>="16.0"', limit=10000)
        sent = self.last("/api/v0/bundles/")["body"]
        self.assertEqual((sent["gpu_name"], sent["geolocation"], sent["cpu_ram"], sent["disk_space"], sent["limit"]),
                         ({"eq": "RTX 4090"}, {"in": ["CA", "US"]}, {"gte": 16000.0}, {"gte": "16"}, 10000))
        self.assertFalse({"georegion", "chunked"} & set(sent))
        found = vast.search_offers(query="georegion=true chunked=true")
        self.assertTrue(found)
        for row in found:
            self.assertEqual((row["cpu_ram"], row["cpu_cores"], row["min_bid"], row["gpu_ram"] % 16), (65536, 32, 0, 0))
            self.assertRegex(row["geolocation"], r", [A-Z]{2}, (NA|EU|AS)$")
            self.assertGreater(row["search"]["totalHour"], 0)
        new = vast.create_instance(
            id=str(found[0]["id"]), image="vastai/pytorch", disk=20, label="sky-1", login=None, price=None,
            env={"A": "b"}, onstart_cmd="true", cancel_unavail=True, user=None, extra=None, args=None, force=False,
            python_utf8=False, lang_utf8=False, jupyter_lab=False, jupyter_dir=None, template_hash=None,
            template_hash_id=None)["new_contract"]
        template = self.box.market.rows("templates")[0]["hash_id"]
        other = vast.create_instance(id=self.cheapest(), template_hash=template,
                                     template_hash_id=template)["new_contract"]
        self.assertEqual(vast.show_instance(id=other)["template_hash_id"], template)
        row = next(row for row in vast.show_instances() if row["label"] == "sky-1")
        self.assertEqual(row["id"], vast.show_instance(id=new)["id"])
        self.assertEqual(row["local_ipaddrs"], row["local_ipaddrs"].strip())
        for method in (vast.stop_instance, vast.start_instance, vast.destroy_instance):
            method(id=str(new))
            with self.assertRaises(vastai.VastAIError):
                method(id="999")
        self.assertTrue(all(key["public_key"] for key in vast.show_ssh_keys()))
        self.assertTrue(vast.create_ssh_key(ssh_key=SSH_KEY)["success"])

    def test_errors_are_those_of_requests_too(self):
        """For programs that have imported requests; a stand-in with its names serves as well."""
        requests = types.ModuleType("requests")
        requests.HTTPError = type("HTTPError", (OSError,), {})
        requests.ConnectionError = type("ConnectionError", (OSError,), {})
        requests.Timeout = type("Timeout", (OSError,), {})
        self.box.fail("POST /api/v0/ssh/", 400, {"success": False, "error": "team_ssh_keys_not_supported", "msg": "no"})
        with mock.patch.dict(sys.modules, requests=requests):
            with self.assertRaises(requests.HTTPError) as caught:
                self.client.create_ssh_key(ssh_key=SSH_KEY)
            answer = caught.exception.response
            self.assertIn("team_ssh_keys_not_supported", answer.text)
            self.assertEqual((answer.status_code, answer.reason), (400, "Bad Request"))
            self.assertIsInstance(caught.exception, vastai.VastAIError)
            for family in (vastai.VastAIError, requests.HTTPError):
                self.assertIsInstance(pickle.loads(pickle.dumps(caught.exception)), family)
            self.assertRaises(requests.ConnectionError, vastai.VastAI("k", "http://127.0.0.1:9", retry=1).show_user)
            self.box.fail("GET /api/v0/users/current/?", 429, "slow down")
            with self.assertRaisesRegex(requests.HTTPError, "429"):
                vastai.VastAI(retry=1).show_user()
        self.assertNotIsInstance(vastai.make_error(vastai.VastAIError, "x", response=caught.exception.response), OSError)

    def test_ec2instance(self):
        VastAI = vastai.VastAI
        self.keep_key()
        vast = VastAI(api_key=None)
        for kind, order in (("on-demand", "dph_total"), ("bid", "min_bid")):
            found = vast.search_offers(query="geolocation in [AT,DE,SE,US] cpu_ram>=12 rentable=true", type=kind,
                                       order=order, limit=2000, storage=16.0, no_default=True)
            self.assertTrue(found)
            self.assertEqual([row[order] for row in found], sorted(row[order] for row in found))
            names = ("id num_gpus gpu_name gpu_total_ram dlperf cpu_cores_effective cpu_ghz cpu_ram inet_up inet_down "
                     "inet_up_cost inet_down_cost geolocation hosting_type vms_enabled compute_cap dph_total min_bid")
            self.assertEqual(set(names.split()) - set(found[0]), set())
        sent = self.last("/api/v0/bundles/")["body"]
        self.assertEqual(sent, {"geolocation": {"in": ["AT", "DE", "SE", "US"]}, "cpu_ram": {"gte": 12000.0},
                                "rentable": {"eq": True}, "order": [["min_bid", "asc"]], "type": "bid",
                                "allocated_storage": 16.0, "limit": 2000})
        answer = vast.create_instance(id=str(self.cheapest()), image="vastai/kvm", disk=16.0, env={"-p 22:22": "1"},
                                      runtype="ssh_direct", onstart_cmd="true")
        self.assertTrue(answer["success"])
        self.assertEqual(vast.show_instance(int(answer["new_contract"]))["image_runtype"], "ssh_direct")
        self.assertRaises(vastai.VastAIError, VastAI("revoked").show_instances)
        self.assertRaises(vastai.VastAIError, vast.create_instance, id="1", image="x")
        self.assertTrue(vast.destroy_instance(id=str(answer["new_contract"]))["success"])
        os.unlink(os.path.join(self.home, ".config", "vastai", "vast_api_key"))
        before = len(self.box.requests)
        self.assertRaises(vastai.VastAIError, VastAI(api_key=None).show_instances)
        self.assertEqual(len(self.box.requests), before)

    def test_snakemake_plugin(self):
        vast = vastai.VastAI(api_key=None, raw=True, quiet=True)
        search = dict(type="on-demand", order="dph_total", storage=40.0)
        self.assertFalse(vast.search_offers(query="num_gpus=99", limit=5, **search))
        first, second = vast.search_offers(query="num_gpus=1", limit=2, **search)
        common = dict(image="snakemake/snakemake", disk=40.0, label="smk", env={"A": "1"}, cancel_unavail=True)
        job = vast.create_instance(id=first["id"], runtype="args", onstart_cmd="/bin/sh", args=["-c", "echo hi; exit"],
                                   **common)["new_contract"]
        sent = self.last("/api/v0/asks/.*")["body"]
        self.assertEqual((sent["runtype"], sent["onstart"], sent["args"], sent["cancel_unavail"]),
                         ("args", "/bin/sh", ["-c", "echo hi; exit"], True))
        self.assertRaises(vastai.VastAIError, vast.create_instance, id=first["id"], runtype="args", **common)
        session = vast.create_instance(id=second["id"], runtype="ssh_proxy", onstart_cmd="sleep 9",
                                       **common)["new_contract"]
        self.assertIn("ssh_host", vast.show_instance(int(session)))
        vast.wait_instance(job, poll=0.1)
        self.assertIsInstance(vast.logs(job, tail="10000"), str)
        self.assertEqual(vast.logs(job, tail="50", filter="no such line"), "")
        self.assertTrue(vast.attach_ssh(session, SSH_KEY)["success"])
        self.assertTrue(vast.reboot_instance(job)["success"])
        for id in (job, session):
            vast.destroy_instance(id)
        self.assertFalse(vast.show_instance(job))

    def test_kestrel(self):
        results = []

        def work():
            vast = vastai.VastAI(api_key="k")
            found = vast.search_offers(query="gpu_ram >= 20 reliability > 0.9 cuda_vers >= 12.0 dph <= 1.0 "
                                             "rentable = true")
            found.sort(key=lambda row: (row["dph_total"], row["num_gpus"], row["reliability"]))
            results.append(found)
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([row["id"] for row in results[0]], [row["id"] for row in results[3]])
        self.assertEqual(len(results), 4)
        sent = self.last("/api/v0/bundles/")["body"]
        self.assertEqual((sent["cuda_max_good"], sent["dph_total"]), ({"gte": "12.0"}, {"lte": "1.0"}))
        vast = vastai.VastAI(api_key="k")
        new = vast.create_instance(id=results[0][0]["id"], image="vastai/pytorch", disk=10, onstart=None,
                                   label="kestrel", env="-e A=1 -e B=x", login=None)["new_contract"]
        self.assertEqual(vast.show_instance(id=new)["extra_env"], {"A": "1", "B": "x"})
        text = vast.create_instance(id=results[0][1]["id"], image="x/y", onstart="echo hi")
        self.assertEqual(self.last("/api/v0/asks/.*")["body"]["onstart"], "echo hi")
        self.assertIn("train.py", vast.execute(ID=new, COMMAND="ls /workspace"))
        vast.wait_instance(new, poll=0.1)
        self.assertRegex(vast.scp_url(id=new), r"^scp://root@[\w.]+:\d+$")
        for id in (new, text["new_contract"]):
            vast.destroy_instance(id=id)

    def test_separateai(self):
        offers = self.raw("search offers 'num_gpus=1 rentable=true' -o dph+")
        self.assertEqual([row["dph_total"] for row in offers], sorted(row["dph_total"] for row in offers))
        create = (f"create instance {offers[0]['id']} --image a/b --disk 40 --env '-p 8000:8000 -e K=V' "
                  "--onstart-cmd 'run it' --label sep --raw")
        id = json.loads(self.ok(create))["new_contract"]
        self.assertEqual(self.last("/api/v0/asks/.*")["body"]["env"], {"-p 8000:8000": "1", "K": "V"})
        status, out, err = self.run_process(create)
        self.assertEqual((status, out), (4, ""))
        self.assertRegex(err, r'"status_code": 4\d\d')
        self.assertLessEqual({"error", "status_code", "msg"}, set(json.loads(err)))
        self.ok(f"start instance {id}")
        self.assertEqual(self.raw(f"show instance {id}")["label"], "sep")
        self.assertIn(id, [row["id"] for row in self.raw("show instances")])
        self.assertEqual(len(self.ok(f"logs {id} --tail 1").splitlines()), 1)
        self.ok(f"destroy instance {id} -y")
        self.assertEqual(self.run_here(f"show instance {id} --raw")[0], 4)

    def test_names_that_are_imported(self):
        self.script(
            "from vastai.sdk import VastAI; from vastai import vastai_sdk, VastAI as V\n"
            "from vastai.utils import parse_env\n"
            "from vastai.api.query import parse_query, offers_fields, offers_alias, offers_mult\n"
            "import vastai.cli.main; assert vastai.cli.main.main(['--version']) == 0\n"
            "assert V is VastAI is vastai_sdk.VastAI\n"
            "client = V(api_key='k'); assert client.client.api_key == client.api_key_access == 'k'\n"
            "client.api_key_access = 'm'; assert client.api_key == 'm'\n"
            "assert client.creds_source == 'CODE'\n"
            "assert isinstance(client.show_instances(raw=True), list)")

    def test_values_that_programs_pass(self):
        """extra={"ssh_key": ...}; and region="" for anywhere, which is a mistake on the command line."""
        extra = {"ssh_key": SSH_KEY}
        self.client.create_instance(self.cheapest(), image="a/b", extra=extra)
        self.assertEqual(self.last("/api/v0/asks/.*")["body"]["extra"], extra)
        self.client.launch_instance("RTX_4090", "1", "a/b", region="")
        self.assertNotIn("geolocation", self.last("/api/v0/launch_instance/")["body"]["q"])
        self.assertEqual(self.run_here("launch instance -g RTX_4090 -n 1 -i a/b -r ''")[0], 2)

    def test_old_keywords(self):
        query = dict(gpu_name="RTX_4090", num_gpus="1", image="a/b", disk=16, ssh=True, label="x")
        self.assertIn("new_contract", self.client.launch_instance(onstart_cmd="true", **query))
        sent = self.last("/api/v0/launch_instance/")["body"]
        self.assertEqual((sent["q"]["gpu_name"], sent["onstart"], sent["runtype"]),
                         ({"eq": "RTX 4090"}, "true", "ssh_proxy"))
        template = self.box.market.rows("templates")[0]["hash_id"]
        for given, member, value in (
                (dict(onstart="a", image="x"), "onstart", "a"), (dict(entrypoint="b", image="x"), "onstart", "b"),
                (dict(template_hash_id=template), "template_hash_id", template)):
            self.client.create_instance(ID=self.cheapest(), **given)
            self.assertEqual(self.last("/api/v0/asks/.*")["body"][member], value)
        self.assertEqual(len(self.client.show_instances(raw=True)), len(self.client.show_instances()))

    def test_habits_on_the_command_line(self):
        self.assertEqual(self.run_process("show user")[0], 0)
        self.assertEqual(self.run_process("show user --api-key revoked")[0], 3)
        self.assertEqual(self.raw("search offers --on-demand num_gpus=8"), json.loads(self.ok(
            ["search offers", "num_gpus=8", "--raw"])))
        lines, rows = self.ok("search offers num_gpus=1").splitlines(), self.client.search_offers("num_gpus=1")
        self.assertEqual([line.split()[0] for line in lines], ["ID", *(str(row["id"]) for row in rows)])
        script = os.path.join(self.home, "start.sh")
        with open(script, "w") as file:
            file.write("echo one\necho two\n")
        id = self.raw(f"create instance {self.cheapest()} --image a/b --onstart {script} --ssh")["new_contract"]
        sent = self.last("/api/v0/asks/.*")["body"]
        self.assertEqual((sent["onstart"], sent["runtype"]), ("echo one\necho two\n", "ssh_proxy"))
        self.assertEqual(self.run_process(f"destroy instance {id}")[0], 2, "no answer is no")
        self.assertEqual(self.run_process(f"destroy instance {id}", input="y\n")[0], 0)
        self.ok(f"create instance {self.cheapest()} --image a/b --raw --args --model Qwen/Qwen3-8B --raw -o x -- -h")
        self.assertEqual(self.last("/api/v0/asks/.*")["body"]["args"],
                         ["--model", "Qwen/Qwen3-8B", "--raw", "-o", "x", "--", "-h"])
        for line in ("--raw show user", "show user --raw", "--url {} show user --raw"):
            self.assertEqual(json.loads(self.ok(line.format(self.box.url)))["username"], "ada", line)
        self.assertEqual(self.raw("show env-vars --show-values"), self.raw("show env-vars --show_values"))


# ----------------------------------------------------------------------------------- pure functions


class PureTest(unittest.TestCase):
    """What needs no service: queries, environments, orders, dates, places, tables."""

    def test_no_name_stands_for_two_things(self):
        """The later one would take the place of the other, wherever that is used."""
        seen = collections.Counter()
        for node in ast.parse(pathlib.Path(HERE, "vastai.py").read_text(encoding="utf-8")).body:
            targets = getattr(node, "targets", [node.target] if isinstance(node, ast.AnnAssign) else [])
            stored = [part.id for target in targets for part in ast.walk(target)
                      if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]
            seen.update({*stored, getattr(node, "name", None)} - {None})
        self.assertEqual([name for name, count in seen.items() if count > 1], [])

    def test_what_may_be_sent_again_and_when(self):
        def top(low, high):
            return high
        for safe, failure, attempt, attempts, asked, pause in (
                (True, "unsent", 1, 3, None, 0.25), (False, "unsent", 2, 3, None, 0.5), (False, "unsent", 3, 3, None, None),
                (True, "unanswered", 1, 3, None, 0.25), (False, "unanswered", 1, 3, None, None),
                (False, "unanswered", 1, 3, 0, None), (True, "unanswered", 1, 3, 2, 2), (True, "unanswered", 1, 3, 61, None),
                (True, "limited", 1, 3, None, 0.25), (False, "limited", 1, 3, None, 0.25), (False, "limited", 2, 3, 7.5, 7.5),
                (True, "limited", 1, 3, 60, 60), (True, "limited", 1, 3, 60.1, None), (True, "limited", 1, 3, float("inf"), None),
                (True, "refused", 1, 3, None, None), (True, "refused", 1, 3, 1, None),
                (True, "limited", 1, 1, 1, None), (True, "unsent", 9, 99, None, 60), (True, "unsent", 5000, 9999, None, 60)):
            with self.subTest(safe=safe, failure=failure, attempt=attempt, asked=asked):
                self.assertEqual(vastai.retry_pause(safe, failure, attempt, attempts, asked, top), pause)
        self.assertEqual(vastai.retry_pause(True, "unsent", 3, 9, None, lambda low, high: low), 0)
        for status, failure in ((301, "refused"), (400, "refused"), (401, "refused"), (404, "refused"), (408, "unanswered"),
                                (429, "limited"), (500, "refused"), (501, "refused"), (502, "unanswered"), (503, "unanswered"),
                                (504, "unanswered"), (519, "refused"), (520, "unanswered"), (524, "unanswered"), (525, "refused")):
            self.assertEqual(vastai.failure_kind(status), failure, status)

    def test_where_redirects_lead(self):
        for method, url, status, location, target in (
                ("GET", "http://h/a/b?x=1", 302, "/c", ("http://h/c", True)), ("GET", "http://h/a/b", 301, "c#d", ("http://h/a/c", True)),
                ("GET", "http://h/a", 303, "http://other/c?y", ("http://other/c?y", False)),
                ("PUT", "http://h/a", 307, "/c", ("http://h/c", True)), ("POST", "http://h/a", 308, "//o/c", ("http://o/c", False)),
                ("GET", "http://h/a", 302, "https://h/a", ("https://h/a", False)),
                ("PUT", "http://h/a", 302, "/c", None), ("DELETE", "http://h/a", 303, "/c", None),
                ("GET", "https://h/a", 302, "http://h/a", None), ("GET", "http://h/a", 302, "ftp://h/", None),
                ("GET", "http://h/a", 302, "http://h:x/", None)):
            with self.subTest(method=method, status=status, location=location):
                if target:
                    self.assertEqual(vastai.redirect_target(method, url, status, location), target)
                else:
                    self.assertRaises(ValueError, vastai.redirect_target, method, url, status, location)

    def test_hosts_that_need_no_proxy(self):
        hosts = ("a.example.com", "example.com", "notexample.com", "10.1.2.3", "::1", "2001:db8::5")
        for entry, exempt in (("*", hosts), ("example.com", hosts[:2]), (".example.com", hosts[:2]), ("*.example.com", hosts[:2]),
                              ("EXAMPLE.com:443", hosts[:2]), ("example.com:80", ()), ("ample.com", ()), ("10.0.0.0/8", hosts[3:4]),
                              ("10.1.2.3", hosts[3:4]), ("10.1.2.3:443", hosts[3:4]), ("10.1.2.3:44", ()), ("11.0.0.0/8", ()),
                              ("::1", hosts[4:5]), ("[::1]", hosts[4:5]), ("[::1]:443", hosts[4:5]), ("[::1]:80", ()),
                              ("0:0:0:0:0:0:0:1", hosts[4:5]), ("2001:db8::/32", hosts[5:]), ("", ()), ("x/y,10.0.0.0/99", ()),
                              ("example.com:\u00b2 example.com:" + "9" * 5000, ()),
                              ("x, 10.1.2.0/24 ::1", hosts[3:5])):
            with self.subTest(entry=entry[:40]):
                self.assertEqual(tuple(host for host in hosts if vastai.is_exempt(entry, host, 443)), exempt)

    def test_json_that_nobody_can_use(self):
        long, deep = "9" * 101, "[" * 102 + "]" * 102
        for size, number in ((0, 99), (300_000, 99), (17_000_000, 1)):
            pad = " " * size
            for text in ("1e999", "-1E+999", '{"a": [1, 2e400]}', long, "-" + long, "9" * 400 + ".5", deep, "NaN", "Infinity",
                         "[[],{},".replace(",", ",[") * 70 + "1" + "]" * 140, '{"a":' * 120 + "1" + "}" * 120)[:number]:
                with self.subTest(text=text[:20], size=size), self.assertRaises(ValueError):
                    vastai.parse_json((text + pad).encode())
            for text in ("1e99", "1e-999", '"1e999 Infinity"', f'"{long}"', f'"{deep}{deep}"', deep[1:-1], "0.1e+3", "\ufeff[1]", "9" * 100,
                         '["' + '", "'.join(["[[{"] * 60) + '"]')[-number:]:
                with self.subTest(text=text[:20], size=size):
                    self.assertEqual(vastai.parse_json((text + pad).encode()), json.loads((text + pad).encode("utf-8")))
        with self.assertRaises(ValueError) as caught:
            vastai.parse_json(b"[" + b"[]," * 6_000_000 + b"[]]")
        self.assertEqual(len(vastai.parse_json(b'"' + b"x" * (40 << 20) + b'"')), 40 << 20)
        self.assertIn("memory", str(caught.exception))
        self.assertRaises(ValueError, vastai.parse_json, b"9" * 3_000_000)  # at once, without counting its digits

    def test_gzip(self):
        one, two = gzip.compress(b"one "), gzip.compress(b"two")
        self.assertEqual(vastai.unzip(one + two), (b"one two", ""))
        self.assertEqual(vastai.unzip(one + b"\0\0"), (b"one ", ""))
        for data in (one[:-3], one + two[:-9], one[:5]):
            self.assertRaises(ConnectionError, vastai.unzip, data)
        self.assertIn("gzip", vastai.unzip(b"plain")[1])
        self.assertIn("64 MB", vastai.unzip(gzip.compress(b" " * (64 << 20) + b" ", 1))[1])
        self.assertIn("64 MB", vastai.unzip(gzip.compress(b" " * (33 << 20), 1) * 2)[1])

    def test_keys_that_cannot_be(self):
        for key in ("two words", "'quoted'", '"quoted"', "$VAST_API_KEY", "${KEY}", "tab\t", "", None, 7, b"bytes", "\u00fc"):
            self.assertEqual(bool(vastai.key_fault(key)), key != "", key)
        self.assertEqual(vastai.key_fault("k" * 64), "")

    def test_members_of_answers_are_read_as_what_they_should_be(self):
        for value, number in ((7, 7), (0.5, 0.5), ("7", 7), (" 7.5 ", 7.5), ("1e3", 1000.0), (-2, -2), (True, None), (None, None),
                              ("", None), ("x", None), ("nan", None), (float("inf"), None), ("1e999", None), (10 ** 400, None),
                              ([], None), ({}, None), ("\u00b2", None)):
            with self.subTest(value=str(value)[:20]):
                self.assertEqual(vastai.as_number(value), number)
                self.assertIs(type(vastai.as_number(value)), type(number))
        self.assertEqual([vastai.as_whole(value) for value in (7, 7.0, "7", 7.5, None, "x", True)], [7, 7, 7, None, None, None, None])
        self.assertEqual([vastai.as_text(value) for value in ("a", 7, None, [], True, {})], ["a", "7", "", "", "", ""])
        self.assertEqual(vastai.as_rows([{"a": 1}, None, 7, [{}], {}]), [{"a": 1}, {}])
        for odd in (None, 7, "x", {}, {"a": []}):
            self.assertEqual((vastai.as_rows(odd), vastai.as_list(odd)), ([], []))
        self.assertEqual([vastai.as_dict(value) for value in ({"a": 1}, None, [], "x")], [{"a": 1}, {}, {}, {}])

    def test_queries(self):
        def parse(text):
            return vastai.parse_query(text, {}, vastai.OFFER_FIELDS, vastai.ALIASES, vastai.MULTIPLIERS)
        for text, expected in (
                ("", {}),
                ("num_gpus>=2", {"num_gpus": {"gte": "2"}}),
                ("num_gpus >= 2 num_gpus<8", {"num_gpus": {"gte": "2", "lt": "8"}}),
                ("id>1 id<=2 id==3", {"id": {"gt": "1", "lte": "2", "eq": "3"}}),
                ("id!=1", {"id": {"neq": "1"}}),
                ("id gte 1 id lt 2", {"id": {"gte": "1", "lt": "2"}}),
                ("id gt 1 id lte 2 id neq 3", {"id": {"gt": "1", "lte": "2", "neq": "3"}}),
                ("id not eq 3", {"id": {"neq": "3"}}), ("id noteq 3 id eq 4", {"id": {"neq": "3", "eq": "4"}}),
                ("gpu_name=RTX_4090", {"gpu_name": {"eq": "RTX 4090"}}),
                ('gpu_name="RTX 4090" cpu_ram>="64.0"', {"gpu_name": {"eq": "RTX 4090"}, "cpu_ram": {"gte": 64000.0}}),
                ('gpu_name in ["RTX 4090",H100_SXM]', {"gpu_name": {"in": ["RTX 4090", "H100 SXM"]}}),
                ('gpu_name in "RTX 4090, RTX_3090,"', {"gpu_name": {"in": ["RTX 4090", "RTX 3090"]}}),
                ('gpu_name in "[RTX 4090, RTX_3090]"', {"gpu_name": {"in": ["RTX 4090", "RTX 3090"]}}),
                ('gpu_name in "RTX_4090', {"gpu_name": {"in": ["RTX 4090"]}}),
                ("geolocation notin [CN, VN]", {"geolocation": {"notin": ["CN", "VN"]}}),
                ("geolocation not in [CN]", {"geolocation": {"notin": ["CN"]}}),
                ("geolocation nin [CN]", {"geolocation": {"notin": ["CN"]}}),
                ("geolocation in US", {"geolocation": {"in": ["US"]}}),
                ("dph<1 cuda_vers>=12.1 dlperf_usd>5 flops_usd>6 display_active=false",
                 {"dph_total": {"lt": "1"}, "cuda_max_good": {"gte": "12.1"}, "dlperf_per_dphtotal": {"gt": "5"},
                  "flops_per_dphtotal": {"gt": "6"}, "gpu_display_active": {"eq": False}}),
                ("gpu_ram>=24 gpu_total_ram>48 duration>=3",
                 {"gpu_ram": {"gte": 24000.0}, "gpu_total_ram": {"gt": 48000.0}, "duration": {"gte": 259200.0}}),
                ("verified=true external=False rented=None", {
                    "verified": {"eq": True}, "external": {"eq": False}, "rented": {"eq": None}}),
                ("driver_version>=570.124.4", {"driver_version": {"gte": 570124004}}),
                ("reliability=any", {}),
        ):
            with self.subTest(text):
                self.assertEqual(parse(text), expected)
        start = {"verified": {"eq": True}}
        self.assertEqual(vastai.parse_query("verified=any id=1", start), {"id": {"eq": "1"}})
        for fields in (vastai.BENCHMARK_FIELDS, {"driver_version"}):  # the second as offers_fields is
            found = vastai.parse_query("driver_version>=570.124.4", {}, fields, tell=lambda text: None)
            self.assertEqual(found, {"driver_version": {"gte": 570124004}})
        self.assertEqual(vastai.parse_query(["id>1", "id<3"], start), {**start, "id": {"gt": "1", "lt": "3"}})
        self.assertEqual(start, {"verified": {"eq": True}}, "what is given stays as it was")
        for text, sign in (
                ("num_gpus", "cannot parse"), ("num_gpus>", "cannot parse"), ("id=>1", "'=>'"), ("id about 1", "'about'"),
                ("id>any", "only with ="), ("gpu_ram>=lots", "expected a number"), ("gpu_name in []", "empty"),
                ('gpu_name=""', "empty"), ("driver_version>5.1", "570.124.4"), ("gpu_ram>=nan", "a number"),
                ("num_gpus>=1 ; rm", "; rm"), ("gpu_name=RTX 4090 id=1", "write gpu_name=RTX_4090")):
            with self.subTest(text), self.assertRaisesRegex(vastai.UsageError, re.escape(sign)):
                parse(text)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            parse("gpu_nmae=x")
        self.assertIn("did you mean 'gpu_name'", err.getvalue())
        self.assertRaises(vastai.UsageError, parse, "id " * 30000 + "!")

    def test_environments(self):
        for text, expected in (
                (None, {}), ("", {}), ({"A": "1"}, {"A": "1"}),
                ("-e A=1 -e B='x y' -e C=a=b", {"A": "1", "B": "x y", "C": "a=b"}),
                ("-p 8080:8080 -p 53:53/udp -v /data:/data -n mesh-a -h host",
                 {"-p 8080:8080": "1", "-p 53:53/udp": "1", "-v /data:/data": "1", "-n mesh-a": "1", "-h": "host"}),
                ("-eA=1 --env B=2 --env=C=3 D=4 -e=E=5", {"A": "1", "B": "2", "C": "3", "D": "4", "E": "5"}),
                ('{"A": "1", "-p 80:80": "1", "N": 2, "T": true}', {"A": "1", "-p 80:80": "1", "N": "2", "T": "true"}),
                ("--publish 8000-8010:8000-8010/udp --publish=127.0.0.1:80:80 -p8080:80 -p 22 -p [::1]:1:1", {
                    f"-p {ports}": "1" for ports in ("8000-8010:8000-8010/udp", "127.0.0.1:80:80", "8080:80", "22", "[::1]:1:1")}),
                ("--volume V.12:/my-data:ro --network=mesh-a --hostname box-1", {
                    "-v V.12:/my-data:ro": "1", "-n mesh-a": "1", "-h": "box-1"}),
                (["A=1", "-e B='x y'", "-p 80:80"], {"A": "1", "B": "x y", "-p 80:80": "1"}), (["", " "], {}),
                ("-e 'A=two words' -e \"B=3\"", {"A": "two words", "B": "3"}), ("-e A= -e B=''", {"A": "", "B": ""}),
                ("-e A=don't -e B='it is'", {"A": "don't", "B": "it is"}), ("-e A='\"b\"'", {"A": '"b"'}),
                ('-e J=\'{"a": "b"}\'', {"J": '{"a": "b"}'}), ('-e J="{\\"a\\": 1}"', {"J": '{"a": 1}'}),
                ('-e OPTS=--name="my model"', {"OPTS": '--name="my model"'}), ("-e A=x\n-e B=y", {"A": "x", "B": "y"}),
                ("-e A=x \\\n -e B=y \\ \r\n-e P=C:\\\n-e C='1 \\\n2' -e D=C:\\w", {"A": "x", "B": "y", "P": "C:\\", "C": "1 \\\n2", "D": "C:\\w"})):
            with self.subTest(text):
                told = []
                self.assertEqual(vastai.parse_env(text, told.append), expected)
                self.assertEqual(told, [])
        for text, left_out in (
                ("--gpus all -e A=1", ["--gpus"]), ("-e A=1 --shm-size=16g --ipc=host", ["--shm-size", "--ipc"]),
                ("--rm -it -e A=1 --ulimit memlock=-1", ["--rm", "-it", "--ulimit"]), ("-e A=0 -e A=1", ["A is given twice"])):
            with self.subTest(text):
                told = []
                self.assertEqual(vastai.parse_env(text, told.append), {"A": "1"})
                self.assertEqual(len(told), len(left_out))
                for words, part in zip(told, left_out):
                    self.assertIn(part, words)
        for text, words in (
                ("FOO hunter2", "cannot read 'FOO'; write -e FOO=VALUE"), ("FOO", "-e FOO=VALUE"), ("-e FOO", "'FOO'; write -e NAME=VALUE"),
                ("-e", "-e needs a value"), ("-e -p 80:80", "cannot read -e"), ("-p", "-p needs"), ("-p web:80", "write -p 8080:8080"),
                ("-p 80;reboot", "cannot read -p"), ("-v $(x):/y", "cannot read -v"), ("-n 'a b'", "cannot read -n"),
                ("-e TOKEN=hunter 2", "after TOKEN is no option; quote"), ("--sudo -e A=1", "'--sudo'"), ("-x", "'-x'"), ("-e A='b", "not closed"),
                ("{A:1}", "cannot read the JSON"), ('{"A": null}', "'A'"), ('{"A": {}}', "'A'"), ("-e =x", "-e NAME=VALUE"),
                ("-e 'a b=c'", "cannot read -e")):
            with self.subTest(text), self.assertRaises(vastai.UsageError) as caught:
                vastai.parse_env(text)
            self.assertIn(words, caught.exception.msg)
            self.assertNotIn("hunter", caught.exception.msg)

    def test_environments_of_templates_are_text(self):
        for given, text in (
                ("-p 3000:3000 -e A='x y' --shm-size 16g", "-p 3000:3000 -e A='x y' --shm-size 16g"), ("A=1 -p 80:80", "-e A=1 -p 80:80"),
                (["-e A=1", "-e B=2"], "-e A=1 -e B=2"), ({"A": "x y", "-p 80:80": "1", "-h": "box"}, "-e A='x y' -p 80:80 -h box"),
                ('{"A": "it\'s"}', '-e A="it\'s"'), ("", "")):
            with self.subTest(given):
                self.assertEqual(vastai.ENV_TEXT.convert(given), text)
                self.assertEqual(vastai.parse_env(vastai.format_env(given), len), vastai.parse_env(given, len))
        self.assertRaises(vastai.UsageError, vastai.ENV_TEXT.convert, "FOO BAR")

    def test_fields_are_described_once_and_in_full(self):
        for name, text in vars(vastai).items():
            if name.endswith("_FIELDS") and isinstance(text, str):
                lines, names = text.split("\n"), [field for field, _ in vastai.field_help(text)]
                self.assertEqual(sorted(set(names)), sorted(names), name)
                for line in lines:
                    kind = re.fullmatch(r"\w+: ([^,]+), \S.*", line)
                    self.assertTrue(kind, f"{line!r} in {name} is not `field: type, meaning`")
                    known = kind.group(1) in vastai.EXPECTED or re.fullmatch(r"number.*|[A-Z$%].*|cents|days|date", kind.group(1))
                    self.assertTrue(known, f"{line!r} in {name}: no type, and no unit")
        fields = {field for field, _ in vastai.field_help(vastai.OFFER_FIELDS)}
        self.assertEqual({*vastai.ALIASES.values(), *vastai.MULTIPLIERS} - fields, set(), "fields that OFFER_FIELDS lacks")

    def test_orders_that_cannot_be_read_or_are_not_known(self):
        for text in ("dph down", "dph:desc", "dph num_gpus", "(dph)", "dph--"):
            with self.subTest(text), self.assertRaises(vastai.UsageError):
                vastai.parse_order(text, {}, vastai.OFFER_FIELDS, len)
        told = []
        self.assertEqual(vastai.parse_order("num_gpu,score,dph", vastai.ALIASES, vastai.OFFER_FIELDS, told.append),
                         [["num_gpu", "asc"], ["score", "asc"], ["dph_total", "asc"]])
        self.assertEqual(len(told), 1)
        self.assertIn("did you mean 'num_gpus'", told[0])

    def test_values_of_a_query_are_checked_against_their_field(self):
        for text, form in (
                ("num_gpus in [1,2", "a bracket is missing in '[1,2'"), ("verified=maybe", "true or false, not 'maybe'"), ("verified=ture", "verified=true"), ("verified=yes", "verified=true"),
                ("verified=true,rentable=true,gpu_name=RTX_4090", "at ',rentable=true,gpu_name=RTX_4090'; write"),
                ("datacenter=1", "datacenter=true"), ("static_ip=0", "static_ip=false"), ("verified>true", "=, !=, in"),
                ("num_gpus=one", "expected a number, not 'one'"), ("dph<$0.5", "write dph<0.5"), ("inet_down>=1,000", "write inet_down>=1000"),
                ("inet_down>=1_000", "inet_down>=1000"), ("reliability>99%", "write reliability>0.99"),
                ("reliability>99", "write reliability>0.99"), ("reliability>=120", "0 to 1"), ("gpu_ram>=24GB", "write gpu_ram>=24"),
                ("gpu_ram>=24000", "write gpu_ram>=24"), ("cpu_ram>=64000", "write cpu_ram>=64"), ("disk_space>100gb", "disk_space>100"),
                ("compute_cap>=8.9", "write compute_cap>=890"), ("geolocation=Norway", "country code such as NO, not 'Norway'"),
                ("geolocation=UK", "geolocation=GB"), ("geolocation=EU", "geolocation=EU georegion=true"), ("geolocation in [US,XX]", "'XX'"),
                ("georegion=EU", "geolocation=EU georegion=true"),
                ("georegion=true geolocation=Europe", "a region (AF"), ("georegion=maybe", "geolocation=EU georegion=true"),
                ("chunked=1", "chunked=true"), ("driver_version>=535", "driver_version>=535.0.0"), ("driver_version>=550.x.1", "570.124.4"),
                ("cuda_vers>=12.4.1", "a number"), ("ubuntu_version=jammy", "22.04"), ("gpu_name=RTX_4090,RTX_3090", "gpu_name in [RTX_4090,RTX_3090]"),
                ("gpu_name in [RTX_4090 RTX_3090]", "commas"), ("gpu_arch in [nvidia amd]", "[nvidia,amd]"), ("machine_id in [1 2]", "a number"),
                ("gpu_name=true", 'gpu_name="true"'), ("gpu_name=A;num_gpus=2", "separated by spaces"), ("gpu_name>A", "=, !="),
                ("num_gpus>=null", "a number, not 'null'"), ("num_gpus>=2,dph<1", "',dph<1'; write"), ("num_gpus=1e999", "a number"),
                ("num_gpus=[1,2]", "num_gpus in [1,2]"), ("num_gpus=1,2", "num_gpus in [1,2]"), ("gpu_name=RTX 4090", "quote a value"),
                ("geolocation in US CA", "[US,CA]"), ("rentable=true,", None), ("geolocation in [ ]", "empty"), ("num_gpus=,", "empty"), ("gpu_name='", None)):
            with self.subTest(text):
                if form is None:
                    with contextlib.suppress(vastai.UsageError):
                        vastai.parse_query(text, {}, vastai.OFFER_FIELDS, vastai.ALIASES, vastai.MULTIPLIERS)
                    continue
                with self.assertRaises(vastai.UsageError) as caught:
                    vastai.parse_query(text, {}, vastai.OFFER_FIELDS, vastai.ALIASES, vastai.MULTIPLIERS)
                self.assertIn(form, caught.exception.msg)
        for fields, text in ((vastai.BENCHMARK_FIELDS, "last_update>=soon"), (vastai.TEMPLATE_FIELDS, "private=2"),
                             (vastai.INVOICE_FIELDS, "amount_cents>$30"), (vastai.VOLUME_FIELDS, "disk_space>1TB"),
                             (vastai.TEMPLATE_FIELDS, "created_at>02/30/2026")):
            with self.subTest(text), self.assertRaises(vastai.UsageError):
                vastai.parse_query(text, {}, fields)

    def test_values_that_a_field_can_have(self):
        europe = vastai.GEOREGIONS["EU"].split()
        for text, expected in (
                ("rentable=TRUE verified=False", {"rentable": {"eq": True}, "verified": {"eq": False}}),
                ("verified in [true,false]", {"verified": {"in": ["true", "false"]}}),
                ("cluster_id notin [null]", {"cluster_id": {"notin": ["null"]}}), ("cluster_id!=null", {"cluster_id": {"neq": None}}),
                ("geolocation=us", {"geolocation": {"eq": "US"}}), ("geolocation notin [CN RU]", {"geolocation": {"notin": ["CN", "RU"]}}),
                ("geolocation=EU georegion=true", {"geolocation": {"in": europe}, "georegion": {"eq": True}}),
                ("geolocation=US georegion=true", {"geolocation": {"eq": "US"}, "georegion": {"eq": True}}),
                ("georegion=True geolocation in [EU,NA]", {"geolocation": {"in": [*europe, "CA", "US"]}, "georegion": {"eq": True}}),
                ("geolocation!=eu georegion=true", {"geolocation": {"notin": europe}, "georegion": {"eq": True}}),
                ("num_gpus>=2 \\\n  dph<1 \\\r\n gpu_name=A100", {
                    "num_gpus": {"gte": "2"}, "dph_total": {"lt": "1"}, "gpu_name": {"eq": "A100"}}),
                ("gpu_name='RTX 4090'", {"gpu_name": {"eq": "RTX 4090"}}), ("gpu_name in [RTX 4090, H100 SXM]", {
                    "gpu_name": {"in": ["RTX 4090", "H100 SXM"]}}),
                ("gpu_name!=A_1 gpu_name!=B_2", {"gpu_name": {"notin": ["A 1", "B 2"]}}),
                ("gpu_name!=A gpu_name!=B gpu_name!=C", {"gpu_name": {"notin": ["A", "B", "C"]}}),
                ("gpu_name!=A gpu_name!=B gpu_name notin [C,A]", {"gpu_name": {"notin": ["A", "B", "C"]}}),
                ("gpu_name notin [A] gpu_name notin [B]", {"gpu_name": {"notin": ["A", "B"]}}),
                ("gpu_name notin [A] gpu_name!=B", {"gpu_name": {"notin": ["A"], "neq": "B"}}),
                ("gpu_name notin [A] gpu_name!=B gpu_name!=C gpu_name!=D", {"gpu_name": {"notin": ["B", "C", "D", "A"]}}),
                ("gpu_name!=A gpu_name!=A", {"gpu_name": {"neq": "A"}}), ("gpu_name!=A", {"gpu_name": {"neq": "A"}}),
                ("driver_version in [570.124.4,570124005]", {"driver_version": {"in": [570124004, "570124005"]}}),
                ("cpu_arch=x86_64", {"cpu_arch": {"eq": "x86_64"}}), ("compute_cap>0 gpu_frac<=.5", {
                    "compute_cap": {"gt": "0"}, "gpu_frac": {"lte": ".5"}})):
            with self.subTest(text):
                told = []
                found = vastai.parse_query(text, {}, vastai.OFFER_FIELDS, vastai.ALIASES, vastai.MULTIPLIERS, told.append)
                self.assertEqual((found, told), (expected, []))
        day = {"gte": 1769817600}
        for date in ("2026-01-31", "01/31/2026", "1769817600", '"Jan 31 2026"', "31_January_2026"):
            self.assertEqual(vastai.parse_query(f"last_update>={date}", {}, vastai.BENCHMARK_FIELDS), {"last_update": day})
        self.assertEqual(vastai.parse_query("service=stripe_payments", {}, vastai.INVOICE_FIELDS), {"service": {"eq": "stripe_payments"}})

    def test_conditions_that_are_given_twice(self):
        for text, expected, remark in (
                ("num_gpus>=2 num_gpus>=4", {"num_gpus": {"gte": "4"}}, "num_gpus>=4 replaces num_gpus>=2"),
                ("dph<1 dph_total<2", {"dph_total": {"lt": "2"}}, "dph_total<2 replaces dph<1"),
                ("gpu_name in [A] gpu_name in [B]", {"gpu_name": {"in": ["B"]}}, "gpu_name in [B] replaces gpu_name in [A]"),
                ("num_gpus>=2 num_gpus=any", {}, "num_gpus=any drops num_gpus>=2"), ("num_gpus>=2 num_gpus>=2", {"num_gpus": {"gte": "2"}}, None),
                ("verified=false", {"verified": {"eq": False}}, None), ("no_such=1 no_such>0", {"no_such": {"eq": "1", "gt": "0"}}, "no_such")):
            with self.subTest(text):
                told = []
                found = vastai.parse_query(text, {"verified": {"eq": True}} if "verified" in text else {}, vastai.OFFER_FIELDS,
                                           vastai.ALIASES, vastai.MULTIPLIERS, told.append)
                self.assertEqual((found, len(told)), (expected, 1 if remark else 0))
                self.assertIn(remark or "", "".join(told))

    def test_orders(self):
        for text, expected in (
                (None, [["score", "desc"]]), ("dph", [["dph_total", "asc"]]), ("dph+", [["dph_total", "asc"]]),
                ("dph-", [["dph_total", "desc"]]), ("-dph", [["dph_total", "desc"]]), ("", []),
                ("num_gpus-, dph", [["num_gpus", "desc"], ["dph_total", "asc"]]), ([["id", "asc"]], [["id", "asc"]]),
                ("dph desc, num_gpus asc", [["dph_total", "desc"], ["num_gpus", "asc"]]), ("dph DESC", [["dph_total", "desc"]]),
                (["dph desc", "id"], [["dph_total", "desc"], ["id", "asc"]])):
            with self.subTest(text):
                self.assertEqual(vastai.parse_order(text, vastai.ALIASES, vastai.OFFER_FIELDS, self.fail), expected)

    def test_dates(self):
        noon = 1767614400.0  # 2026-01-05 12:00 UTC
        for text in ("2026-01-05 12:00", "2026-01-05T12:00:00Z", "2026-01-05 13:00+01:00", "01/05/2026 12:00",
                     "5 January 2026 12pm", "Jan 5, 2026 12:00:00", "2026-01-05T12:00:00.000", "2026/01/05 12:00",
                     "Mon, 05 Jan 2026 13:00:00 +0100", "Monday 5th January 2026 12pm", "2026-01-05 12:00 GMT",
                     "20260105T120000Z", "5-Jan-2026 12:00", "1/5/26 12:00:00 PM", "2026-01-05T12", noon, int(noon)):
            with self.subTest(text):
                self.assertEqual(vastai.parse_when(text), noon)
        self.assertEqual(vastai.parse_when("20260105"), noon - HOUR * 12)
        for text in ("01/05/2026", "2026-01-05", " 2026-01-05 ", "1767571200", "1767571200.0"):
            self.assertIs(type(vastai.parse_when(text)), int, "whole days are whole")
        self.assertEqual(vastai.parse_when("1767614400.5"), noon + 0.5)
        for text in ("2026-02-30", "13/01/2026", "soon", "", "2026-01-05 25:00", "x" * 100, "٢٠٢٦-01-05", "nan", "-5", -5,
                     "1899900000000", "9" * 30, "1e9", "1_0", "1969-12-31"):
            with self.subTest(text), self.assertRaises(ValueError):
                vastai.parse_when(text)
        self.assertEqual([vastai.format_utc(noon), vastai.format_utc("soon"), vastai.format_duration(93600), vastai.format_duration(59)],
                         ["2026-01-05 12:00", "soon", "1d 2h", "0m"])

    def test_every_country_is_in_one_region_and_every_european_one_in_eu(self):
        iso = """
            AF AX AL DZ AS AD AO AI AQ AG AR AM AW AU AT AZ BS BH BD BB BY BE BZ BJ BM BT BO BQ BA BW BV BR IO BN BG BF BI CV KH CM
            CA KY CF TD CL CN CX CC CO KM CG CD CK CR CI HR CU CW CY CZ DK DJ DM DO EC EG SV GQ ER EE SZ ET FK FO FJ FI FR GF PF TF
            GA GM GE DE GH GI GR GL GD GP GU GT GG GN GW GY HT HM VA HN HK HU IS IN ID IR IQ IE IM IL IT JM JP JE JO KZ KE KI KP KR
            KW KG LA LV LB LS LR LY LI LT LU MO MG MW MY MV ML MT MH MQ MR MU YT MX FM MD MC MN ME MS MA MZ MM NA NR NP NL NC NZ NI
            NE NG NU NF MK MP NO OM PK PW PS PA PG PY PE PH PN PL PT PR QA RE RO RU RW BL SH KN LC MF PM VC WS SM ST SA SN RS SC SL
            SG SX SK SI SB SO ZA GS SS ES LK SD SR SJ SE CH SY TW TJ TZ TH TL TG TK TO TT TN TR TM TC TV UG UA AE GB US UM UY UZ VU
            VE VN VG VI WF EH YE ZM ZW""".split()
        listed = sorted(code for codes in vastai.GEOREGIONS.values() for code in codes.split())
        self.assertEqual(listed, sorted([*iso, "XK"]))
        europe = """AD AL AT AX BA BE BG BY CH CZ DE DK EE ES FI FO FR GB GG GI GR HR HU IE IM IS IT JE LI LT LU LV MC MD ME MK MT
            NL NO PL PT RO RS RU SE SI SJ SK SM UA VA""".split()  # UN M49
        self.assertLessEqual(set(europe), set(vastai.GEOREGIONS["EU"].split()))
        regions = {name: codes.split() for name, codes in vastai.REGIONS.items()}  # the service's own lists, in its order
        self.assertEqual([(name, codes[:3], len(codes)) for name, codes in regions.items()],
                         [("North_America", ["AG", "BS", "BB"], 23), ("South_America", ["AR", "BO", "BR"], 14),
                          ("Europe", ["AL", "AD", "AT"], 46), ("Asia", ["AF", "AM", "AZ"], 49),
                          ("Oceania", ["AS", "AU", "CK"], 24), ("Africa", ["DZ", "AO", "BJ"], 54)])

    def test_files_are_read_without_their_mark_and_with_plain_line_ends(self):
        with temporary_folder() as folder:
            path = os.path.join(folder, "on.sh")
            script = "#!/bin/bash\nif true; then\necho 'grüße'\nfi\n"
            for codec in ("utf-8", "utf-8-sig", "utf-16"):
                for end in ("\n", "\r\n"):
                    with self.subTest(codec, end=end):
                        with open(path, "w", encoding=codec, newline=end) as file:
                            file.write(script)
                        self.assertEqual(vastai.SCRIPT.convert(path), script)
                        self.assertEqual(vastai.SCRIPT_OR_TEXT.convert(path), script)
            for odd in (b"\xff", b"a\0b", b"\xff\xfea"):
                with open(path, "wb") as file:
                    file.write(odd)
                self.assertRaises(vastai.UsageError, vastai.SCRIPT.convert, path)
        for text in ("echo hi", "echo hi\necho ho", "x" * 50_000, folder):
            self.assertEqual(vastai.SCRIPT_OR_TEXT.convert(text), text)

    def test_diagnostics_are_redacted_whatever_the_secret_looks_like(self):
        jwt = "eyJhbGciOiJI.eyJzdWIiOiIx.abc-_d"
        key = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNz\nAAAA\n-----END OPENSSH PRIVATE KEY-----"
        for text, secret in (
                ("API_KEY=hunter2 next", "hunter2"), ('"token": "hunter 2", "x": 1', "hunter 2"), ("password: hunter2, bar", "hunter2"),
                ("Authorization: Bearer hunter2hunter2", "hunter2"), ('curl -H "Authorization: Basic aHVudGVyMg=="', "aHVudGVyMg"),
                ("docker login -u bob -p 9d8df!fd89ufZ docker.io", "9d8df!fd89ufZ"), ("docker login -p 'hunter 2'", "hunter 2"),
                ("https://user:hunter2@host/x", "hunter2"), ("git clone https://u:hun@ter@h/x", "ter@"), ("root:hunter2@1.2.3.4", "hunter2"),
                ("MYSQL_PASS=hunter2", "hunter2"), ('SSH_PASSPHRASE="hunter 2"', "hunter 2"), ("WANDB_KEY=hunter2", "hunter2"),
                ("AWS_SESSION=hunter2", "hunter2"), ("aws_secret_access_key = hunter2", "hunter2"), ("Cookie: a=b; sid=hunter2", "hunter2"),
                ("Set-Cookie: sid=hunter2; Path=/", "hunter2"), (f"got {jwt} done", "eyJzdWIiOiIx"),
                ("push with ghp_abcdefghijklmnop1234", "abcdefghijklm"), ("hf_ABCDEFGHIJKLMNOP", "ABCDEFGHIJ"),
                ("sk-proj-abcdefghijklmnop", "abcdefgh"), ("AKIAABCDEFGHIJKLMNOP", "ABCDEFGH"), (f"x\n{key}\ny", "b3BlbnNz"),
                (key[:60], "b3BlbnNz"), ("--registry-token hunter2", "hunter2"), ("mysql -u root -phunter2", "hunter2"),
                ('{\\"token\\": \\"hunter 2\\"}', "hunter 2"), ("X-Auth-Token: hunter2", "hunter2"), ("PASS=hunter2", "hunter2"),
                ("\u0130 token=hunter2", "hunter2"), ("my secretkey", "secretkey"),
                ('["HF_TOKEN","hunter 2"]', "hunter 2"), ('"name": "HF_TOKEN", "value": "hunter 2"', "hunter 2"), ("--authkey hunter23", "hunter23"),
                ("docker run -e TOKEN hunter23", "hunter23"), ("PrivateKey = hunter2", "hunter2"), ("privkey=hunter2", "hunter2"),
                ("masterkey=hunter2", "hunter2"), ("DBPASS=hunter2", "hunter2"), ("&X-Amz-Signature=hunter2&", "hunter2"),
                ("?sig=hunter2", "hunter2"), ("token%3Dhunter2", "hunter2"), ("machine x login y password hunter23", "hunter23"),
                ("sk_live_abcdefghijkl", "abcdefgh"), ("https://hooks.slack.com/services/T0/B0/hunter2", "hunter2"),
                ("https://discord.com/api/webhooks/12/hunter2", "hunter2"), ("curl -u user:hunter2 https://x", "hunter2"),
                ("git clone https://hunter2hunter2@github.com/x", "hunter2"), ("wandb login hunter2hunter2", "hunter2")):
            with self.subTest(text):
                clean = vastai.redact_diagnostics({"log": [text]}, ["secretkey"])["log"][0]
                self.assertNotIn(secret, clean)
                self.assertIn("REDACTED", clean)
        for text in ("docker run -p 8080:8080 -p 80 -p 5000/udp x", "mkdir -p /a/b", "tests passed: 5, monkey: 3",
                     "image:tag@sha256:abcdef", "task-123456789012345", "the token expired", "http://host:80/a@b",
                     "tokens/s: 35.1", "Failed password for root", "docker run -u 1000:1000 x", "login succeeded", "ssh://me@host/x"):
            self.assertEqual(vastai.redact_diagnostics(text, []), text)
        words = ["--token", "hunter2", "-p", "hunter2", "-p", "8080:80", "--max-tokens", "64", "got a token", "next line", "KEY_B", {"a": "b"}]
        clean = ["REDACTED" if word == "hunter2" else word for word in words]
        self.assertEqual(vastai.redact_diagnostics({"image_args": words}, []), {"image_args": clean})
        self.assertEqual(vastai.redact_diagnostics([{"name": "HF_TOKEN", "value": "hunter2"}, {"name": "a", "value": 7}], []),
                         [{"name": "HF_TOKEN", "value": "REDACTED"}, {"name": "a", "value": 7}])
        names = {"HF_TOKEN": 1, "DB_PASS": "a", "SSH_KEY": "b", "AWS_X": "c", "cookie": "d", "keys": "e"}
        self.assertEqual(vastai.redact_diagnostics(names, []), {**dict.fromkeys(names, "REDACTED"), "keys": "e"})

    def test_places(self):
        countries = " ".join(vastai.REGIONS.values()).split()
        self.assertEqual(sorted(set(countries)), sorted(countries), "no country is in two regions")
        self.assertTrue(all(len(country) == 2 and country.isupper() for country in countries))
        self.assertEqual(vastai.GEOREGIONS["NA"], "CA US")

    def test_versions(self):
        query = vastai.parse_query("driver_version>=570.124.4")
        self.assertEqual(query, {"driver_version": {"gte": 570124004}})
        for text in ("570.124", "570.124.4.1", "a.b.c", "570.1240.4", "570..4", "\u0665.1.1"):
            self.assertRaises(vastai.UsageError, vastai.parse_query, f"driver_version>={text}")
        self.assertEqual(len(vastai.__version__.split(".")), 3)

    def test_tables(self):
        rows = [{"id": 7, "name": "日本", "gpu": {"ram": 24}, "price": 0.12345},
                {"id": 1234, "name": "e\u0301\tb", "price": None}, {"id": 9, "name": "", "gpu": None, "price": "dear"}]
        columns = (("ID", "id", "", 0), ("Name", "name", "", 1), ("RAM", "gpu.ram", ".1f", 2),
                   ("$", "price", ".2f/2", 3))
        lines, dropped = vastai.format_table(rows, columns, None, False)
        self.assertEqual(lines, ["ID    Name   RAM     $", "7     日本  24.0  0.06", "1234  e\u0301\\tb     -     -",
                                 "9     -        -  dear"])
        self.assertEqual(dropped, [])
        lines, dropped = vastai.format_table(rows, columns, 12, False)
        self.assertEqual(dropped, ["RAM", "$"])
        self.assertTrue(all(vastai.display_width(line) <= 12 for line in lines), lines)
        wide = [{"id": 1, "image": "x" * 40, "age": "2d 0h", "hash": "a" * 32}]
        columns = (("ID", "id", "", 0), ("Image", "image", "", 2), ("Hash", "hash", "", 0), ("Age", "age", "", 3))
        lines, dropped = vastai.format_table(wide, columns, 63, False)
        self.assertEqual((lines[1], dropped), (f"1   {'x' * 17}…  {'a' * 32}  2d 0h", []))  # text shrinks, hashes stay
        self.assertEqual(vastai.format_table(wide, columns, 50, False)[1], ["Image"])  # Age still fits
        many = [(f"C{number}", "x", "", 1) for number in range(40)]
        names = [column[0] for column in many]
        self.assertEqual(vastai.format_table([{"x": "1"}], many, 2, False)[1], names[1:], "in the order of the table")
        self.assertTrue(vastai.format_table(rows, columns, None, True)[0][0].startswith("\033[1m"))
        self.assertEqual([vastai.truncate("日本語", 5), vastai.truncate("abc", 3), vastai.display_width("e\u0301日"),
                          vastai.display_width("\u0e01\u0e35\u20dd")],
                         ["日本…", "abc", 3, 1])

    def test_tables_for_awk(self):
        rows = [{"id": 7, "name": "RTX 4090", "place": "Texas, US", "note": "a b"}, {"id": 12345, "name": " ", "note": " "},
                {"id": 3, "name": "日\u3000本\u00a0x", "place": "", "note": None}]
        columns = (("ID", "id", "", 0), ("GPU name", "name", "", 0), ("Up Mb/s", "place", "", 0), ("My note", "note", "", 0))
        lines, _ = vastai.format_table(rows, columns, None, False)
        self.assertEqual([line.split(None, 3) for line in lines], [
            ["ID", "GPU_name", "Up_Mb/s", "My_note"], ["7", "RTX_4090", "Texas,_US", "a b"], ["12345", "_", "-", "-"],
            ["3", "日_本_x", "-", "-"]])
        self.assertTrue(all(line[0] != " " for line in lines))
        self.assertIn("RTX 4090", vastai.format_table(rows, columns, 100, False)[0][1])

    def test_cells_of_any_type(self):
        odd = [None, "", " ", True, 0, 1.0, -1, 2.5, 1e300, "7", "x", "2026-01-31T13:00:59.25Z", "2026-13-31T25:00:00Z",
               [], [None], {}, {"a": []}, 10 ** 30]
        names = ("x", "gpu_util", "num_gpus", "gpu_name", "disk_space", "disk_util", "disk_usage", "volume_info", "inet_up",
                 "inet_down", "template_id", "template_name", "ssh_host", "ssh_port", "old_x", "new_x")
        for form in (*vastai.FORMATS, *vastai.ROW_FORMATS, "", ".1f", ".2f/1000", ".1f*100", "{}x"):
            for value in odd:
                cell = vastai.format_cell(("X", "x", form), dict.fromkeys(names, value))
                self.assertTrue(isinstance(cell, str) and cell, (form, value))
            vastai.format_table([dict.fromkeys(names, value) for value in odd], (("X", "x", form, 1),), None, False)
        for form, value, cell in (("weekday", 1.0, "Monday"), ("weekday", "1", "Monday"), ("hour", 13.0, "1 PM"),
                                  ("minute", "2026-01-31T13:00:59.25Z", "2026-01-31 13:00"),
                                  ("minute", "2026-01-31T13:00:59+01:00", "2026-01-31 12:00"),
                                  ("minute", "2026-01-31 13:00:59", "2026-01-31 13:00"), ("N/A", None, "N/A"),
                                  ("minute", 1769864400, "2026-01-31 13:00"), ("minute", "soon", "soon")):
            self.assertEqual(vastai.format_cell(("X", "x", form), {"x": value}), cell)

    def test_columns_of_numbers_alone(self):
        rows = [{"n": 5, "price": 0.05, "share": 99.96, "big": 10 ** 40},
                {"n": -12, "price": 3, "share": -1, "big": 1}]
        columns = (("日本", "n", "", 0), ("$", "price", ".2f", 0), ("%", "share", ".1f", 0), ("Big", "big", ".0f", 3))
        lines, dropped = vastai.format_table(rows, columns[:3], 80, False)
        self.assertEqual((lines, dropped), (["日本     $      %", "5     0.05  100.0", "-12   3.00   -1.0"], []))
        self.assertEqual(vastai.format_table(rows, columns, None, False)[0][2].split(), ["-12", "3.00", "-1.0", "1"])
        self.assertEqual(vastai.format_table([], columns, 80, True), (["\033[1m日本  $  %  Big\033[0m"], []))
        narrow = vastai.format_table([{"n": 10 ** 15, "price": 1.0, "share": 5.5}], columns[:3], 20, False)[0]
        self.assertEqual(narrow, ["日本          $    %", "10000000…  1.00  5.5"])

    def test_json_is_as_json_makes_it(self):
        for value in ([], {}, [[]], {"b": 1, "a": [1, {"x": None}], "": "é\n"}, [1, [2, {}], "x"], "text", None, 1.5,
                      {"a": {}, "b": [], "c": [{"d": [True]}]}, [{"a": "},\n  {", "b": "],\n ["}, {"a": {}}, {}, []]):
            self.assertEqual(vastai.format_json(value), json.dumps(value, indent=1, sort_keys=True))
        rng = random.Random(7)

        def anything(depth):
            kind = rng.random() * (depth < 5)
            if kind < 0.4:
                return rng.choice([1, 2.5, None, True, "x", "},\n {", "\0", "{}", "[", {}, []])
            some = range(rng.randint(0, 4))
            return [anything(depth + 1) for _ in some] if kind < 0.7 else {
                rng.choice(["a", "b", "}", "\n", "é"]): anything(depth + 1) for _ in some}
        for value in (anything(0) for _ in range(2000)):
            self.assertEqual(vastai.format_json(value), json.dumps(value, indent=1, sort_keys=True))


# ---------------------------------------------------------------------------- faults: the transport


USER, RENTED = {"id": 7, "username": "u"}, {"success": True, "new_contract": 77}
LONG = json.dumps({"success": True, "text": "x" * 5000}).encode()
CHUNKED = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PACKED = gzip.compress(LONG)
GZIP = {"Content_Encoding": "gzip"}
LOST = {  # no whole answer came
    "closes at once": AT_ONCE,
    "hangs up": hang_up,
    "resets": reset,
    "half a status line": cut(b"HTTP/1."),
    "half the headers": cut(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "no HTTP": cut(b"220 mail.example.com ESMTP\r\n\r\n"),
    "cut body": cut(reply(LONG)[:-100]),
    "no body": cut(reply(LONG)[:-len(LONG)]),
    "cut chunk": cut(CHUNKED.encode() + b"100\r\n{\"id\""),
    "cut between chunks": cut(CHUNKED.encode() + b"2\r\n{}\r\n"),
    "bad chunk size": cut(CHUNKED.encode() + b"zz\r\n{}\r\n0\r\n\r\n"),
    "cut gzip": reply(PACKED[:-20], **GZIP),
    "502": reply("<html>Bad Gateway</html>", 502),
    "503": reply({"msg": "busy"}, 503),
    "504": reply("", 504),
    "408": reply("", 408),
    **{str(status): reply("<html>error", status) for status in range(520, 525)},
}
SLOW = {
    "stalls": stall,
    "stalls in the headers": stuck(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n"),
    "stalls in the body": stuck(reply(LONG)[:-100]),
    "trickles headers": trickle(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 500),
    "trickles a body": trickle(reply(LONG)),
    "goes on with 100": stuck(b"HTTP/1.1 100 Continue\r\n\r\n" * 50),
}
UNREADABLE = {  # a whole answer that nobody can read: never repeated, never taken for empty
    "HTML": reply("<!DOCTYPE html><html><body>Welcome</body></html>"),
    "nothing": reply(b""),
    "cut JSON without a length": cut(b'HTTP/1.1 200 OK\r\n\r\n{"id": 7, "na'),
    "NaN": reply('{"id": NaN}'),
    "Infinity": reply('{"id": -Infinity}'),
    "a number beyond all": reply('{"id": 1e999}'),
    "a number of 9000 digits": reply('{"id": ' + "9" * 9000 + "}") if hasattr(sys, "get_int_max_str_digits")
              else reply("{"),
    "deep": reply("[" * 200_000),
    "bad gzip": reply(b"\x1f\x8b\x08" + bytes(range(100)), **GZIP),
    "no gzip at all": reply({"id": 7}, **GZIP),
    "bytes": reply(bytes(range(128, 256)) * 9),
    "a list": reply("[]"),
    "a list of objects": reply('[{"id": 7}]'),
    "a number": reply("42"),
}


class TestLostAnswers(FaultCase):
    """What is safe to repeat is repeated, what is not is sent once; the exception tells them apart."""

    def test_a_refusal_after_a_loss(self):
        """What is refused may have been done by the try whose answer was lost."""
        for step in (reply({"msg": "no such instance"}, 404), reply({"msg": "is destroyed"}, 400), reply({"success": False, "msg": "no"})):
            for line, told in (("label instance 7 x", True), ("destroy instance 7 -y", True), ("show ssh-keys", False)):
                with self.subTest(line=line):
                    status, _, err = self.run_here(self.serve(hang_up, step), *line.split())
                    self.assertNotEqual(status, 0)
                    self.assertEqual("earlier attempt" in err, told, err)

    def calls(self, client):
        return [("safe", client.show_user, ()), ("safe list", client.show_ssh_keys, ()),
                ("safe write", client.label_instance, (7, "x")),
                ("once", client.reboot_instance, (7,)), ("once, path", client.create_instance, (7, "image")),
                ("once, no id", client.create_team, ("t",))]

    def test_lost(self):
        for fault, step in LOST.items():
            server = self.serve(step)
            for name, call, args in self.calls(self.client(server)):
                with self.subTest(fault=fault, call=name):
                    del server.requests[:]
                    server.connections = 0
                    error = self.error(call, *args)
                    count = server.connections if fault == "closes at once" else len(server.requests)
                    if name.startswith("once"):
                        self.assertEqual((type(error), error.exit_status, count), (vastai.OutcomeUnknownError, 7, 1))
                        self.assertRegex(str(error), "`vastai (show|list|tfa) [a-z-]+")
                    elif fault.isdigit():
                        self.assertEqual((type(error), error.status, count), (vastai.VastAIError, int(fault), 3))
                    else:
                        self.assertEqual((type(error), error.exit_status, count), (vastai.NetworkError, 6, 3))

    def test_slow(self):
        def attempt(fault, step, name):
            server = self.serve(step)
            client = self.client(server, timeout=0.5, retry=2)
            call, args = {name: (call, args) for name, call, args in self.calls(client)}[name]
            error = self.error(call, *args)
            results.append((fault, name, type(error), len(server.requests), str(error)))
        results = []
        threads = [threading.Thread(target=attempt, args=(*item, name)) for item in SLOW.items()
                   for name in ("safe", "once")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(len(results), 2 * len(SLOW))
        for fault, name, family, count, text in results:
            with self.subTest(fault=fault, call=name):
                self.assertIs(family, vastai.NetworkError if name == "safe" else vastai.OutcomeUnknownError)
                self.assertEqual(count, 2 if name == "safe" else 1)
                self.assertIn("timed out", text)  # not what becomes of the connection when the server is done

    def test_unreadable(self):
        for fault, step in UNREADABLE.items():
            server = self.serve(step)
            for name, call, args in self.calls(self.client(server)):
                if name == "safe list" and fault.startswith("a list"):
                    continue
                with self.subTest(fault=fault, call=name):
                    del server.requests[:]
                    error = self.error(call, *args)
                    self.assertEqual((type(error), error.exit_status, len(server.requests)), (vastai.VastAIError, 1, 1))
                    self.assertLess(len(str(error)), 500)

    def test_not_a_list(self):
        for body in ("null", "{}", '{"instances": null}', '{"instances": {}}', '{"instances": [1]}',
                     '{"instances": [null]}', '"none"'):
            server = self.serve(reply(body))
            for call in (self.client(server).show_instances, self.client(server).show_ssh_keys,
                         self.client(server).search_templates):
                with self.subTest(body=body):
                    self.assertIs(type(self.error(call)), vastai.VastAIError)

    def test_pages(self):
        """All pages to the end, but a token that comes again or is none is an error."""
        page = {"instances": [{"id": 1}], "success": True}
        for token in (7, ["x"], {"a": 1}, True):
            self.assertIs(type(self.error(self.client(self.serve(reply({**page,
                                                                        "next_token": token}))).show_instances)),
                          vastai.VastAIError)
        self.assertIn("same page", str(self.error(self.client(self.serve(reply({**page,
                                                                                "next_token": "x"}))).show_instances)))
        server = self.serve(reply({**page, "next_token": "x"}), hang_up, reply({**page, "next_token": "y"}),
                            reply(page))
        self.assertEqual(len(self.client(server).show_instances()), 3)

    def test_recovers(self):
        for fault, step in LOST.items():
            with self.subTest(fault=fault):
                server = self.serve(step, step, reply(USER))
                self.assertEqual(self.client(server).show_user()["id"], 7)

    def test_refused(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
            for call, args in ((self.client(url).show_user, ()), (self.client(url).create_instance, (7, "image"))):
                error = self.error(call, *args)
                self.assertIs(type(error), vastai.NetworkError)
                self.assertIn("refused", str(error).lower())

    def test_reached_in_the_end(self):
        """What has not been sent may be tried again, whatever it is."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ready = []
        def listen(seconds):
            if not ready:
                ready.append(self.serve(reply(RENTED)))
                relay = socket.socket()
                self.addCleanup(relay.close)
                relay.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                relay.bind(("127.0.0.1", port))
                relay.listen(5)
                ready[0].listener, old = relay, ready[0].listener
                self.addCleanup(old.close)
                threading.Thread(target=ready[0].accept, daemon=True).start()
            return 0.0
        with mock.patch("random.uniform", lambda low, high: listen(high)):
            answer = self.client(f"http://127.0.0.1:{port}").create_instance(7, "image")
        self.assertEqual((answer["new_contract"], len(ready[0].requests)), (77, 1))

    def test_statuses_in_every_order(self):
        for row in itertools.product((429, 500, 502, 503, 504), repeat=3):
            for safe in (True, False):
                with self.subTest(row=row, safe=safe):
                    server = self.serve(*(reply({"msg": f"no {status}"}, status) for status in row))
                    client = self.client(server)
                    call = client.show_user if safe else functools.partial(client.create_instance, 7, "image")
                    again = (429, 502, 503, 504) if safe else (429,)
                    sent = next((at for at, status in enumerate(row, 1) if status not in again), 3)
                    last = row[sent - 1]
                    family = (vastai.RateLimitError if last == 429 else vastai.VastAIError if safe or last == 500
                              else vastai.OutcomeUnknownError)
                    error = self.error(call)
                    self.assertEqual((type(error), error.status, len(server.requests)), (family, last, sent))
                server.__exit__()

    def test_every_row(self):
        """For every row: sent once or at most `retry` times, and the right exception."""
        faults = {"hangs up": hang_up, "503": reply("", 503)}
        for fault, step in faults.items():
            server = self.serve(step)
            client = self.client(server, retry=2)
            for row in vastai.COMMANDS.values():
                if not row.path or row.face == "cli":
                    continue
                with self.subTest(fault=fault, command=row.name):
                    del server.requests[:]
                    error = self.error(getattr(client, row.methods[0]), **believable(row, "sdk", self.home))
                    place = re.compile(re.sub(r"\\{\w+\\}", "[^/?]+", re.escape(row.path.rpartition(":")[2])) + "$")
                    own = [request for request in server.requests if request["method"] == row.method
                           and place.search(request["path"])]
                    self.assertTrue(server.requests)
                    self.assertLessEqual(len(server.requests), 4)
                    if own and not row.safe:
                        self.assertEqual((type(error), len(own)), (vastai.OutcomeUnknownError, 1))
                        self.assertIn("vastai", error.hint)
                        self.assertEqual(len(server.writes), len(set(server.writes)))
                    else:
                        self.assertIs(type(error), vastai.VastAIError if fault == "503" else vastai.NetworkError)
                        self.assertLessEqual(len(own), 2)


class TestRetryAfter(FaultCase):
    def waits(self, *answers, call=None):
        """How long a safe call waits between its attempts, and what became of it."""
        pauses, server = collections.Counter(), self.serve(*answers)
        client = self.client(server)

        def sleep(seconds):  # a pause is slept a second at a time
            pauses[len(server.requests)] += seconds
        with mock.patch.object(time, "sleep", sleep):
            try:
                result = (call or vastai.VastAI.show_user)(client)
            except vastai.VastAIError as error:
                result = error
        return list(pauses.values()), result

    def test_honoured(self):
        date = email.utils.formatdate(time.time() + 30, usegmt=True)
        for value, low, high in (("1", 1, 1), ("0.05", 0.05, 0.05), (" 7 ", 7, 7), ("60", 60, 60), ("0", 0, 0),
                                 (date, 28, 30),
                                 (email.utils.formatdate(0, usegmt=True), 0, 0)):
            for status in (429, 503):
                with self.subTest(value=value, status=status):
                    pauses, result = self.waits(reply("", status, Retry_After=value), reply(USER))
                    self.assertEqual(result["id"], 7)
                    self.assertTrue(low <= pauses[0] <= high, pauses)
        for skew in (-300, 300):  # the service's clock may be wrong
            now = int(time.time()) + skew
            there, later = (email.utils.formatdate(moment, usegmt=True) for moment in (now, now + 7))
            pauses, _ = self.waits(reply("", 429, Retry_After=later, Date=there), reply(USER))
            self.assertEqual(pauses, [7])
        code = "import vastai, sys; print(vastai.pause_asked(vastai.Answer(429, {'Retry-After': sys.argv[1]}, b'', '')))"
        for form in ("%a %b %d %H:%M:%S %Y", "%A, %d-%b-%y %H:%M:%S GMT", "%a, %d %b %Y %H:%M:%S -0000"):
            date = time.strftime(form, time.gmtime(time.time() + 3000))
            out = subprocess.run([sys.executable, "-c", code, date], env={**os.environ, "TZ": "America/New_York"}, stdout=-1,
                                 cwd=os.path.dirname(os.path.abspath(vastai.__file__))).stdout
            self.assertTrue(1000 < float(out) <= 3000, (date, out))

    def test_ignored(self):
        for value in ("-1", "inf", "-inf", "nan", "Infinity", "soon", "", "1e400", "1_0", "0x10", "\u0661", "9" * 500,
                      "Mon", "Mon, 99 Foo 2026",
                      "Fri, 31 Dec 99999 23:59:59 GMT", "12 monkeys"):
            with self.subTest(value=value):
                header = value.encode("utf-8").decode("latin-1")
                pauses, result = self.waits(reply("", 429, Retry_After=header), reply(USER))
                self.assertEqual((result["id"], pauses), (7, [0.0]))

    def test_too_long(self):
        date = email.utils.formatdate(time.time() + 7200, usegmt=True)
        for value, seconds in (("61", 61), ("86400", 86400), ("1e12", 1e12), (date, 7200)):
            pauses, error = self.waits(reply({"msg": "slow down"}, 429, Retry_After=value))
            self.assertEqual((type(error), pauses), (vastai.RateLimitError, []))
            self.assertAlmostEqual(error.retry_after, seconds, delta=5)
            self.assertRegex(str(error), r"slow down; try again in [\d.]+ s( \(.+\))?$")
        pauses, error = self.waits(reply("", 503, Retry_After="3600"))
        self.assertEqual((type(error), error.status, pauses), (vastai.VastAIError, 503, []))
        self.assertIn("3600 s", str(error))

    def test_threshold_in_the_text(self):
        text = "API requests too frequent: endpoint threshold="
        for tail, pause in (("1.0", 1.0), ("4.0", 4.0), ("2", 2.0), ("0.5\n", 0.5), ("3.", 3.0), ("-1", 0.0),
                            ("", 0.0), ("x", 0.0), ("1.2.3", 0.0)):
            with self.subTest(tail=tail):
                pauses, result = self.waits(reply(text + tail, 429), reply(USER))
                self.assertEqual((result["id"], pauses), (7, [pause]))

    def test_last_attempt(self):
        pauses, error = self.waits(reply("", 429, Retry_After="2"))
        self.assertEqual((type(error), error.retry_after, pauses), (vastai.RateLimitError, 2, [2, 2]))

    def test_quota(self):
        body = {"success": False, "error": "search_quota_exceeded", "msg": "Daily search quota exceeded"}
        pauses, error = self.waits(reply(body, 429), call=lambda client: client.search_offers())
        self.assertEqual((type(error), error.exit_status, error.retry_after, pauses),
                         (vastai.RateLimitError, 5, None, []))
        pauses, error = self.waits(reply(body, 429, X_RateLimit_Reset=str(int(time.time()) + 3000)),
                                   call=lambda client: client.search_offers())
        self.assertAlmostEqual(error.retry_after, 3000, delta=5)
        self.assertIn("UTC", str(error))
        for junk in ("\u00b2", "9" * 400, "-5", "nan"):
            pauses, error = self.waits(reply(body, 429, X_RateLimit_Reset=junk),
                                       call=lambda client: client.search_offers())
            self.assertEqual((type(error), pauses), (vastai.RateLimitError, []))

    def test_backoff(self):
        tops = []
        with mock.patch("random.uniform", lambda low, high: tops.append((low, high)) or 0.0):
            self.error(self.client(self.serve(hang_up), retry=11).show_user)
        self.assertEqual(tops, [(0, min(60.0, 0.25 * 2 ** n)) for n in range(10)])


class TestManyAttempts(FaultCase):
    def test_pauses_stay_short(self):
        with mock.patch.object(time, "sleep"), mock.patch("random.uniform", lambda low, high: high):
            error = self.error(self.client("http://127.0.0.1:1", retry=1100).show_user)
        self.assertIs(type(error), vastai.NetworkError)


class TestRedirects(FaultCase):
    def test_secrets_stay_here(self):
        """A body with secrets is for the service alone."""
        other = self.serve(reply({"success": True, "new_contract": 7}))
        for name, given in (("create_env_var", {"name": "A", "value": "s3cr3t-value"}), ("create_instance", {"id": 7, "image": "i", "env": "-e A=s3cr3t-value"})):
            client = self.chain(reply("", 307, Location=other.url + "/x"))[1]
            error = self.error(getattr(client, name), **given)
            self.assertEqual((type(error), error.exit_status, error.status, other.requests), (vastai.VastAIError, 1, 307, []))
            self.assertIn("secrets", str(error))
        self.chain(reply("", 307, Location=other.url + "/x"))[1].label_instance(7, "x")
        self.assertEqual(json.loads(other.requests[0]["body"]), {"label": "x"})

    def test_the_host_that_cannot_be_reached_is_named(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            far = f"http://127.0.0.1:{free.getsockname()[1]}"
            server, client = self.chain(reply("", 302, Location=far + "/x"))
            error = self.error(client.show_user)
            self.assertEqual((type(error), far in str(error), server.url in str(error)), (vastai.NetworkError, True, False))
        far = self.serve(hang_up)
        server, client = self.chain(reply("", 302, Location=far.url + "/x"))
        self.assertIn(far.url, str(self.error(client.show_user)))

    def chain(self, *steps, call=None, **options):
        server = self.serve(*steps, **options)
        return server, self.client(server)

    def test_followed(self):
        for status in (301, 302, 303, 307, 308):
            with self.subTest(status=status):
                server, client = self.chain(reply("", status, Location="/api/v0/there?x=1#part"), reply(USER))
                self.assertEqual(client.show_user()["id"], 7)
                self.assertEqual([request["target"] for request in server.requests][1], "/api/v0/there?x=1")
                self.assertEqual({request["headers"].get("authorization") for request in server.requests},
                                 {f"Bearer {KEY}"})

    def test_of_a_write(self):
        for status in (301, 302, 303, 307, 308):
            for call in ("label_instance", "create_team"):
                with self.subTest(status=status, call=call):
                    server, client = self.chain(reply("", status, Location="/there"), reply({"success": True}))
                    args = (7, "x") if call == "label_instance" else ("t",)
                    if status < 307:
                        error = self.error(getattr(client, call), *args)
                        self.assertEqual((type(error), error.status, error.exit_status, len(server.requests)),
                                         (vastai.VastAIError, status, 1, 1))
                    else:
                        getattr(client, call)(*args)
                        first, second = server.requests
                        self.assertEqual((first["method"], first["body"]), (second["method"], second["body"]))

    def test_elsewhere(self):
        """Another port or host is another service: it gets no key, neither in the header nor in the body, and it cannot
        get it by sending the client back."""
        other = self.serve(reply(USER))
        for host in (f"127.0.0.1:{other.port}", f"localhost:{other.port}", f"user@127.0.0.1:{other.port}"):
            server, client = self.chain(reply("", 307, Location=f"http://{host}/x"))
            client.show_user()
            self.assertNotIn("authorization", other.requests[-1]["headers"])
        home = self.serve(reply(USER))
        other = self.serve(reply("", 302, Location=f"{home.url}/back"))
        server, client = self.chain(reply("", 302, Location=f"{other.url}/x"))
        client.show_user()
        self.assertNotIn("authorization", home.requests[-1]["headers"])
        rows = [row for row in vastai.COMMANDS.values() if vastai.KEY in row.body.values() and row.face != "cli"]
        for row in rows:
            other = self.serve(reply({}))
            server, client = self.chain(reply("", 308, Location=f"{other.url}/x"))
            with contextlib.suppress(vastai.VastAIError):
                getattr(client, row.methods[0])(**believable(row, "sdk", self.home))
            self.assertIn(KEY.encode(), server.requests[0]["body"])
            self.assertNotIn(KEY.encode(), other.requests[0]["body"])

    def test_same_place(self):
        for same, old, new in ((True, "https://console.vast.ai/a", "https://run.vast.ai/b"),
                               (True, "https://vast.ai", "https://vast.ai:443/x"),
                               (False, "http://console.vast.ai/", "http://run.vast.ai/"),
                               (False, "https://console.vast.ai", "https://evilvast.ai"),
                               (False, "https://console.vast.ai", "https://vast.ai.example"),
                               (False, "https://a.example/", "https://b.example/"),
                               (False, "http://console.vast.ai/", "https://console.vast.ai/"),
                               (True, "http://h.example", "http://H.EXAMPLE:80/x"),
                               (False, "http://h.example", "http://h.example:81/x")):
            with self.subTest(old=old, new=new):
                self.assertIs(vastai.key_may_go(*map(urllib.parse.urlsplit, (old, new))), same)

    def test_not_followed(self):
        for target in ("file:///etc/passwd", "ftp://127.0.0.1/x", "javascript:alert(1)", "http://[::1",
                       "http://h:99999/",
                       "http://h:port/", "gopher://x", "data:,x"):
            with self.subTest(target=target):
                server, client = self.chain(reply("", 302, Location=target))
                error = self.error(client.show_user)
                self.assertEqual((type(error), error.exit_status, error.status, len(server.requests)),
                                 (vastai.VastAIError, 1, 302, 1))
        server, client = self.chain(reply({"msg": "gone away"}, 302))
        self.assertIn("gone away", str(self.error(client.show_user)))

    def test_loops(self):
        server, client = self.chain(reply("", 302, Location="/round"))
        error = self.error(client.show_user)
        self.assertEqual((type(error), error.exit_status, len(server.requests)), (vastai.VastAIError, 1, 6))
        server, client = self.chain(*[reply("", 302, Location=f"/{n}") for n in range(5)], reply(USER))
        self.assertEqual(client.show_user()["id"], 7)
        server, client = self.chain(*[reply("", 307, Location=f"/{n}") for n in range(6)], reply(USER))
        error = self.error(client.create_team, "t")
        self.assertEqual((type(error), len(server.requests)), (vastai.VastAIError, 6))

    def test_lost_behind_one(self):
        server, client = self.chain(reply("", 307, Location="/there"), hang_up)
        self.assertIs(type(self.error(client.create_team, "t")), vastai.OutcomeUnknownError)
        self.assertEqual(len(server.requests), 2)

    def test_key_in_the_address(self):
        client = self.chain(reply("", 302, Location=f"ftp://x/{KEY}"))[1]
        self.assertIn("***", str(self.error(client.show_user)))

    def test_hostile_address(self):
        server, client = self.chain(reply("", 302, Location="/a b\u00e9\x7f\x01%zz"), reply(USER))
        self.assertEqual(client.show_user()["id"], 7)
        self.assertTrue(server.requests[1]["target"].isascii())


class TestConnections(FaultCase):
    def test_answers_beyond_all_measure(self):
        """Refused, not repeated, and the process lives: what unpacks to more than memory, or says it is that long."""
        bomb = gzip.compress(b"[" + b"[]," * 30_000_000, 1)
        for step in (reply(bomb, **GZIP), cut(b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"),
                     cut(CHUNKED.encode() + b"ffffffff\r\n"), reply(gzip.compress(b"[" + b"[]," * 6_000_000 + b"[]]", 1), **GZIP)):
            server = self.serve(step)
            for call in (self.client(server).show_ssh_keys, functools.partial(self.client(server).create_team, "t")):
                del server.requests[:]
                error = self.error(call)
                self.assertEqual((type(error), error.exit_status, len(server.requests)), (vastai.VastAIError, 1, 1))
                self.assertRegex(str(error), "64 MB|memory")

    def test_hosts_with_several_addresses(self):
        """The first that answers is taken; one that does not answer leaves the others their share of the time."""
        server = self.serve(reply(USER))
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))  # refuses
            ports = [deaf.getsockname()[1], server.port]
            for order in (ports, ports[::-1]):
                found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port)) for port in order]
                with mock.patch("socket.getaddrinfo", lambda *_, found=found, **__: found):
                    self.assertEqual(self.client("http://service.example", retry=1).show_user()["id"], 7)
            found = [(99, *found[0][1:]), *found]  # of a family that this system lacks
            with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
                self.assertEqual(self.client("http://service.example", retry=1).show_user()["id"], 7)
            for found in ([], [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", ports[0]))]):
                with mock.patch("socket.getaddrinfo", lambda *_, found=found, **__: found):
                    error = self.error(self.client("http://service.example", retry=1).create_team, "t")
                    self.assertEqual((type(error), "service.example" in str(error)), (vastai.NetworkError, True))

    def test_heads_of_answers(self):
        for name, head in {"lines of their own": b"HTTP/1.1 200 OK\nContent-Length: 9\n\n",
                           "any case": b"HTTP/1.1 200\r\ncontent-LENGTH:9\r\n\r\n",
                           "twice": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\nContent-Length: 9\r\n\r\n",
                           "folded": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 9\r\n\r\n",
                           "several announcements": b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 100 C\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"
                           }.items():
            with self.subTest(head=name):
                server = self.serve(head + b'{"id": 7}', reply({"id": 8}))
                client = self.client(server)
                self.assertEqual([client.show_user()["id"] for _ in range(2)], [7, 8])
                self.assertEqual(server.connections, 1)
        for head in (b"HTTP/1.1 100 C\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 9\r\n\r\n[]"):
            server = self.serve(cut(head), reply({"id": 8}))  # no answer yet, and one of two lengths
            self.assertEqual(self.client(server).show_user()["id"], 8)
            error = self.error(self.client(self.serve(cut(head))).create_team, "t")
            self.assertIs(type(error), vastai.OutcomeUnknownError)
        self.assertIn("no HTTP answer, but 'SSH-2.0'", str(self.error(self.client(self.serve(cut(b"SSH-2.0\r\n"))).show_user)))
        error = self.error(self.client(self.serve(reply({"msg": "x"}, 400, X_Thing="one"))).show_user)
        self.assertEqual((error.response.headers["x-thing"], error.response.headers.get("X-THING"), "X-Thing" in error.response.headers),
                         ("one", "one", True))

    def test_reused(self):
        server = self.serve(reply(USER))
        client = self.client(server)
        for _ in range(5):
            client.show_user()
        self.assertEqual(server.connections, 1)
        client.close()
        client.show_user()
        self.assertEqual(server.connections, 2)

    def test_closed_meanwhile(self):
        """A safe request does not notice, even with a single attempt; a write never rides on an idle connection."""
        server = self.serve(reply(USER))
        client = self.client(server, retry=1)
        for _ in range(3):
            client.show_user()
            server.hang_up()
        self.assertEqual((server.connections, len(server.requests)), (3, 3))
        self.assertEqual(client.show_user()["id"], 7)
        client.create_team("t")
        client.create_team("t")
        self.assertEqual(server.connections, 6)

    def test_closed_before_it_was_built(self):
        """A signal can come while it is being built."""
        vastai.Pool.__new__(vastai.Pool).close()

    def test_closed_when_asked(self):
        """The connection looks alive, and is closed as soon as the request comes."""
        server = self.serve(reply(USER), hang_up, reply({"id": 8}))
        client = self.client(server, retry=1)
        self.assertEqual([client.show_user()["id"], client.show_user()["id"]], [7, 8])

    def test_answer_that_nobody_asked_for(self):
        """Bytes that are left on a connection are never taken for the answer to the next request."""
        server = self.serve(reply(USER) + reply({"id": 666}) * 9, reply({"id": 8}), reply({"id": 9}))
        client = self.client(server)
        self.assertEqual([client.show_user()["id"] for _ in range(3)], [7, 8, 9])
        def afterwards(faulty, sock, request):
            sock.sendall(reply(USER))
            time.sleep(0.05)
            sock.sendall(reply({"id": 666}))
            return True
        client = self.client(self.serve(afterwards, reply({"id": 8})))
        first = client.show_user()["id"]
        time.sleep(0.15)
        self.assertEqual((first, client.show_user()["id"]), (7, 8))
        late = self.serve(trickle(reply({"id": 666}), 0.004), reply({"id": 8}))
        client = self.client(late, timeout=0.1, retry=1)
        self.assertIs(type(self.error(client.show_user)), vastai.NetworkError)
        client.timeout = 5
        self.assertEqual(client.show_user()["id"], 8)

    def test_connection_close(self):
        server = self.serve(reply(USER, Connection="close"))
        client = self.client(server)
        client.show_user()
        client.show_user()
        self.assertEqual(server.connections, 2)

    def test_forms_of_a_body(self):
        chunks = b'3\r\n{"i\r\n5;x=y\r\nd": 7\r\n1\r\n}\r\n0\r\n\r\n'
        for name, step in {"chunked": CHUNKED.encode() + chunks,
                           "until the end": cut(b'HTTP/1.1 200 OK\r\n\r\n{"id": 7}'),
                           "HTTP/1.0": cut(b'HTTP/1.0 200 OK\r\n\r\n{"id": 7}'),
                           "BOM": reply(b'\xef\xbb\xbf{"id": 7}'), "gzip": reply(gzip.compress(b'{"id": 7}'), **GZIP),
                           "100 first": b"HTTP/1.1 100 Continue\r\n\r\n" + reply(USER),
                           "slow": trickle(reply(USER), 0.001)}.items():
            with self.subTest(form=name):
                self.assertEqual(self.client(self.serve(step)).show_user()["id"], 7)

    def test_what_is_sent(self):
        server = self.serve(reply({"success": True}))
        self.client(server).label_instance(7, "ä/?…")
        request = server.requests[0]
        self.assertEqual(json.loads(request["body"].decode("utf-8")), {"label": "ä/?…"})
        self.assertEqual({name: request["headers"].get(name) for name in ("accept-encoding", "authorization",
                                                                          "content-type")},
                         {"accept-encoding": "gzip", "authorization": f"Bearer {KEY}",
                          "content-type": "application/json"})
        self.assertRegex(request["headers"]["user-agent"], r"^vastai/[\d.]+ \(python 3\.\d+\)$")
        self.assertNotIn(KEY, request["target"])
        for name in ("a/b", "..", ".", "a?b#c", "ä", "%2f", "a b"):
            self.client(server).show_team_role(name)
            self.assertEqual(urllib.parse.unquote(server.requests[-1]["path"].split("/")[5]), name)
            self.assertEqual(server.requests[-1]["path"].count("/"), 6)
            self.assertNotIn("/../", server.requests[-1]["path"])


class TestProxies(FaultCase):
    def test_a_proxy_that_is_not_there_is_named(self):
        for name, url in (("http_proxy", "http://service.test"), ("https_proxy", "https://service.test")):
            with mock.patch.dict(os.environ, {name: "http://me:hush@127.0.0.1:9", "no_proxy": ""}):
                error = self.error(self.client(url, retry=1).show_user)
            self.assertIn("the proxy 127.0.0.1:9 cannot be reached", str(error))
            self.assertNotIn("hush", str(error))

    def test_kinds_that_are_not_supported(self):
        """Named with their variable, without what may be a password, and at once."""
        for variable, url, words in (("ALL_PROXY", "socks5://me:sesame@h:1080", "SOCKS"), ("http_proxy", "https://me:sesame@h:443", "https proxy"),
                                     ("HTTP_PROXY", "socks5h://h", "SOCKS"), ("all_proxy", "http://", "URL"), ("HTTP_PROXY", "ftp://sesame", "URL")):
            with self.subTest(url=url), mock.patch.dict(os.environ, {variable: url}):
                error = self.error(self.client("http://service.example").create_team, "t")
                self.assertEqual((type(error), error.exit_status), (vastai.NetworkError, 6))
                self.assertIn(variable, str(error))
                self.assertIn(words, str(error))
                self.assertNotIn("sesame", str(error))

    def proxy(self, accepts=True):
        """A proxy: passes plain requests on and CONNECTs, if it likes the password."""
        def route(request):
            if request["headers"].get("proxy-authorization") != "Basic dXNlcjpwYXNzL3dvcmQ=":  # user:pass/word
                return reply("who are you?", 407)
            if request["method"] == "CONNECT":
                return tunnel
            return reply({"id": 7})

        def tunnel(faulty, sock, request):
            host, _, port = request["target"].rpartition(":")
            with socket.create_connection((host, int(port))) as far:
                sock.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                pair = {sock: far, far: sock}
                while True:
                    for end in select.select(list(pair), [], [], 5)[0]:
                        data = end.recv(65536)
                        if not data:
                            return
                        pair[end].sendall(data)
        return self.serve(route=route)

    def use(self, **variables):
        patch = mock.patch.dict(os.environ, variables)
        patch.start()
        self.addCleanup(patch.stop)

    def test_plain(self):
        proxy, server = self.proxy(), self.serve(reply({"id": 8}))
        self.use(HTTP_PROXY=f"http://user:pass%2Fword@127.0.0.1:{proxy.port}")
        self.assertEqual(self.client(server).show_user()["id"], 7)
        self.assertEqual(proxy.requests[0]["target"].split("?")[0], server.url + "/api/v0/users/current")
        self.assertEqual(proxy.requests[0]["headers"]["host"], f"127.0.0.1:{server.port}")
        self.use(NO_PROXY="127.0.0.1")
        self.assertEqual(self.client(server).show_user()["id"], 8)
        self.assertNotIn("proxy-authorization", server.requests[0]["headers"])
        self.use(NO_PROXY=f"localhost,127.0.0.1:{server.port}")
        self.assertEqual(self.client(server).show_user()["id"], 8)
        self.use(NO_PROXY="*.example.com")
        self.assertEqual(self.client(server).show_user()["id"], 7)

    def test_connect(self):
        proxy, server = self.proxy(), self.serve(reply({"id": 8}), tls=server_context(self.home))
        self.use(HTTPS_PROXY=f"http://user:pass%2Fword@127.0.0.1:{proxy.port}",
                 SSL_CERT_FILE=os.path.join(self.home, "ca.pem"))
        client = self.client(server)
        self.assertEqual([client.show_user()["id"] for _ in range(3)], [8, 8, 8])
        self.assertEqual([request["method"] for request in proxy.requests], ["CONNECT"])
        self.assertNotIn("authorization", proxy.requests[0]["headers"])
        self.assertNotIn("proxy-authorization", server.requests[0]["headers"])
        self.assertEqual(server.requests[0]["headers"]["host"], f"127.0.0.1:{server.port}")
        self.assertEqual(client.create_team("t"), {"id": 8})

    def test_all_proxy(self):
        proxy = self.proxy()
        self.use(ALL_PROXY=f"user:pass%2Fword@127.0.0.1:{proxy.port}")
        self.assertEqual(self.client("http://service.example").show_user()["id"], 7)

    def test_refuses(self):
        proxy, server = self.proxy(), self.serve(reply(USER))
        self.use(ALL_PROXY=f"http://user:sesame@127.0.0.1:{proxy.port}")
        for url in (server.url, "https://127.0.0.1:1"):
            for name, args in (("show_user", ()), ("create_team", ("t",))):
                error = self.error(getattr(self.client(url), name), *args)
                self.assertEqual((type(error), error.exit_status), (vastai.NetworkError, 6))
                self.assertNotIn("sesame", "".join(traceback.format_exception(type(error), error, error.__traceback__)))
        self.assertEqual(server.requests, [])

    def test_broken(self):
        slow = (stall, trickle(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 99))
        for step in (cut(b"SSH-2.0-x\r\n"), hang_up, reset, cut(b"HTTP/1.1 "), reply("", 302, Location="/x"), *slow):
            proxy = self.serve(step)
            self.use(HTTPS_PROXY=proxy.url)
            timeout = 0.3 if step in slow else 10
            error = self.error(self.client("https://127.0.0.1:1", timeout=timeout, retry=1).create_team, "t")
            self.assertIs(type(error), vastai.NetworkError)
            self.assertEqual("timed out" in str(error), step in slow)

    def test_all_steps_share_the_timeout(self):
        def late(faulty, sock, request):
            faulty.over.wait(0.5)
            sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            faulty.over.wait(0.5)  # and closes, which nobody should be there to see
        self.use(HTTPS_PROXY=self.serve(late).url)
        error = self.error(self.client("https://127.0.0.1:1", timeout=0.7, retry=1).create_team, "t")
        self.assertEqual((type(error), "timed out" in str(error)), (vastai.NetworkError, True), error)

    def test_the_host_that_was_asked(self):
        self.use(HTTPS_PROXY="http://127.0.0.1:1")
        self.assertIn("https://run.vast.ai", str(self.error(vastai.VastAI(KEY, retry=1).get_endpt_workers, 1)))

    def test_no_proxy_at_all(self):
        for proxy in ("http://user:se/same@127.0.0.1:1", "http://u:x@sesame/y@127.0.0.1:1", "http://[::1", "http://h:sesame", "socks5://127.0.0.1:9",
                      "http://", "ftp://x", "http:///x"):
            self.use(ALL_PROXY=proxy)
            for url in ("http://service.example", "https://service.example"):
                error = self.error(self.client(url).show_user)
                self.assertIs(type(error), vastai.NetworkError)
                self.assertNotIn("same", str(error))


class TestTls(FaultCase):
    def setUp(self):
        super().setUp()
        self.server = self.serve(reply(USER), tls=server_context(self.home))
        self.authority = os.path.join(self.home, "ca.pem")

    def test_unknown_issuer(self):
        for call, args in ((self.client(self.server).show_user, ()), (self.client(self.server).create_team, ("t",))):
            error = self.error(call, *args)
            self.assertEqual((type(error), error.exit_status), (vastai.NetworkError, 6))
            self.assertIn("certificate", str(error))
            self.assertIn("SSL_CERT_FILE", error.hint)
        self.assertEqual(self.server.requests, [])

    def test_authorities(self):
        folder = os.path.join(self.home, "authorities")
        os.mkdir(folder)
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            with mock.patch.dict(os.environ, {variable: self.authority}):
                self.assertEqual(self.client(self.server).show_user()["id"], 7)
        with mock.patch.dict(os.environ, {"REQUESTS_CA_BUNDLE": self.authority}):
            error = self.error(self.client(self.server.url.replace("127.0.0.1", "localhost")).show_user)  # another name
            self.assertIs(type(error), vastai.NetworkError)
        for missing in (os.path.join(self.home, "none.pem"), os.path.join(self.home, "key.pem")):
            with mock.patch.dict(os.environ, {"REQUESTS_CA_BUNDLE": missing}):
                self.assertIn("REQUESTS_CA_BUNDLE", str(self.error(self.client(self.server).show_user)))
        with mock.patch.dict(os.environ, {"SSLKEYLOGFILE": self.home, "SSL_CERT_DIR": self.home}):  # a folder, and of no use
            self.assertNotIn("REQUESTS_CA_BUNDLE", str(self.error(self.client(self.server).show_user)))
        with mock.patch.dict(os.environ, {"SSL_CERT_DIR": folder,
                                          "SSL_CERT_FILE": os.path.join(self.home, "none.pem")}):
            self.assertIs(type(self.error(self.client(self.server).show_user)), vastai.NetworkError)

    def test_faults(self):
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.authority}):
            client = self.client(self.server, retry=1)
            client.show_user()
            self.server.hang_up()
            self.assertEqual(client.show_user()["id"], 7)
            for step in (hang_up, reset, cut(reply(LONG)[:-9])):
                server = self.serve(step, tls=server_context(self.home))
                self.assertIs(type(self.error(self.client(server).show_user)), vastai.NetworkError)
                self.assertEqual(len(server.requests), 3)
                self.assertIs(type(self.error(self.client(server).create_team, "t")), vastai.OutcomeUnknownError)
                self.assertEqual(len(server.requests), 4)
            server = self.serve(stuck(reply(LONG)[:-9]), tls=server_context(self.home))
            self.assertIn("timed out", str(self.error(self.client(server, timeout=0.2, retry=1).show_user)))

    def test_downgrade(self):
        plain = self.serve(reply(USER))
        server = self.serve(reply("", 302, Location=plain.url), tls=server_context(self.home))
        with mock.patch.dict(os.environ, {"SSL_CERT_FILE": self.authority}):
            error = self.error(self.client(server).show_user)
        self.assertEqual((type(error), error.status, plain.requests), (vastai.VastAIError, 302, []))

    def test_not_tls(self):
        plain = self.serve(cut(b"HTTP/1.1 400 Bad\r\n\r\n"))
        error = self.error(self.client(plain.url.replace("http:", "https:"), timeout=0.3, retry=1).create_team, "t")
        self.assertIs(type(error), vastai.NetworkError)


# ------------------------------------------------------------------- faults: what the caller learns


class TestExitStatuses(FaultCase):
    def test_table(self):
        refused = {"success": False, "error": "invalid_args", "msg": "no_such_ask"}
        for status, family, steps, words in (
                (0, None, [reply({"success": True})], "label instance 7 x"),
                (1, "VastAIError", [reply(refused, 400)], "label instance 7 x"),
                (1, "VastAIError", [reply({"msg": "oops"}, 500)], "label instance 7 x"),
                (1, None, [reply(refused)], "label instance 7 x"),
                (1, "VastAIError", [reply("<html>")], "show ssh-keys"),
                (1, "VastAIError", [reply("", 302, Location="https://x/")], "label instance 7 x"),
                (2, "UsageError", [], "set min-bid x"),
                (3, "AuthError", [reply({"msg": "This action requires login"}, 401)], "show ssh-keys"),
                (3, "AuthError", [reply({"msg": "two factor needed"}, 403)], "show ssh-keys"),
                (3, "AuthError", [reply({"msg": "Invalid user key"}, 404)], "show ssh-keys"),
                (4, "NotFoundError", [reply({"msg": "no such"}, 404)], "label instance 7 x"),
                (4, "NotFoundError", [reply({"msg": "no such"}, 410)], "label instance 7 x"),
                (4, None, [reply({"instances": None})], "show instance 7"),
                (5, "RateLimitError", [reply("", 429, Retry_After="0")], "label instance 7 x"),
                (5, "RateLimitError", [reply("", 429, Retry_After="999")], "create team --team-name t"),
                (6, "NetworkError", [hang_up], "label instance 7 x"),
                (6, "NetworkError", [reply("", 407)], "create team --team-name t"),
                (7, "OutcomeUnknownError", [hang_up], "create team --team-name t"),
                (7, "OutcomeUnknownError", [reply("", 503)], "reboot instance 7"),
                (8, "PartialError", [reply({"success": True}), reply("", 500)],
                 "stop instances " + " ".join(map(str, range(1, 66)))),
                (9, "WaitTimeoutError", [reply({"success": True, "result_url": "http://127.0.0.1:1/x"})],
                 "logs 7 --max-wait 0"),
                (9, "WaitTimeoutError", [reply({"instances": {"id": 7, "actual_status": "loading"}})],
                 "wait instance 7 --max-wait 0")):
            with self.subTest(status=status, words=words[:40]):
                server = self.serve(*steps or [hang_up])
                got, out, err = self.run_here(server, *words.split())
                self.assertEqual(got, status, err)
                self.assertEqual(bool(err), bool(status))
                if status not in (0, 8):
                    self.assertEqual(out, "")
                server = self.serve(*steps or [hang_up])
                got, out, err = self.run_here(server, *words.split(), "--raw")
                self.assertEqual(got, status)
                if status:
                    told = json.loads(err)
                    self.assertEqual((sorted(set(told) - {"hint"}), told["error"]), (["error", "msg", "status_code"], True))
                if status == 8:
                    self.assertEqual([item["id"] for item in json.loads(out) if not item["success"]], [65])
                if family:
                    self.assertTrue(issubclass(getattr(vastai, family), vastai.VastAIError))
                    self.assertEqual(getattr(vastai, family).exit_status, status)

    def test_asked_for_json(self):
        """Also where the line cannot be understood."""
        for words in ("set min-bid x --format json", "set min-bid x --format=json", "show nothing --raw",
                      "--ra set min-bid x",
                      "label instance 7 --raw --bad-option"):
            status, out, err = self.run_here("http://127.0.0.1:9", *words.split())
            self.assertEqual((status, out, json.loads(err)["error"]), (2, "", True))
        for words in ("show nothing", "show instance x --format csv"):
            self.assertFalse(self.run_here("http://127.0.0.1:9", *words.split())[2].startswith("{"))

    def test_families(self):
        for family, base in (("UsageError", ValueError), ("NotFoundError", LookupError), ("NetworkError", OSError),
                             ("WaitTimeoutError", TimeoutError)):
            self.assertTrue(issubclass(getattr(vastai, family), base))

    def test_an_error_tells(self):
        error = self.error(self.client(self.serve(reply({"success": False, "error": "e", "msg": "in their words"},
                                                        400))).label_instance, 7, "x")
        self.assertEqual((error.status, error.msg, error.body["error"], error.command),
                         (400, "in their words", "e", "label instance"))
        self.assertEqual((error.response.status_code, error.response.ok, error.response.json()["error"],
                          error.response.headers["content-length"]),
                         (400, False, "e", "57"))
        self.assertIn("label instance: HTTP 400: in their words", str(error))
        client = self.client(self.serve(reply({"error": "busy", "msg": "in their words"}, 503)))
        self.assertIn("HTTP 503: the request was sent, but its outcome is unknown (in their words)", str(self.error(client.create_team, "t")))

    def test_success_false(self):
        body = {"success": False, "msg": "not today"}
        client = self.client(self.serve(reply(body)))
        for call in (lambda: client.label_instance(7, "x"), client.show_clusters, client.show_env_vars,
                     lambda: client.show_instance(7), lambda: client.stop_instances([7]), client.show_invoices,
                     lambda: client.show_machine(7)):
            self.assertEqual(call(), body)
        for call in (client.show_ssh_keys, client.show_instances, lambda: client.logs(7), lambda: client.ssh_url(7)):
            self.assertIn("not today", str(self.error(call)))
        body = {"success": False, "error": "not today"}
        client = self.client(self.serve(reply(body)))
        self.assertEqual((client.update_workers(7), client.get_endpt_logs(7)), (body, body))

    def test_options_of_one_call(self):
        client = self.client(self.serve(reply({"id": 7, "users": [], "success": True})))
        for call in (client.show_user, client.show_subaccounts, client.show_earnings):
            call(raw=True, quiet=True, explain=False, curl=False)

    def test_secrets_as_json_writes_them(self):
        for password in ('say "friend"', "b\\ck", "p\u00e4ss", "longer than longer"):
            for ascii in (True, False):
                body = json.dumps({"msg": f"{password} is taken"}, ensure_ascii=ascii)
                client = self.client(self.serve(reply(body, 400)))
                error = self.error(client.create_subaccount, "a@b.c", "longer than", password)
                self.assertEqual((error.msg, error.body), ("*** is taken", {"msg": "*** is taken"}))
        self.assertEqual(vastai.redact_text("abcdef", ["abc", "abcdef"]), "***")

    def test_no_key_asked_for_json(self):
        with mock.patch.dict(os.environ, HOME=self.home):
            status, _, err = self.run_process("show", "user", "--raw", env={"VAST_API_KEY": ""})
        self.assertEqual(status, 3)
        for place in ("--api-key", "VAST_API_KEY", "vast_api_key", "~/.vast_api_key"):
            self.assertIn(place, json.loads(err)["msg"])

    def test_a_question_leaves_the_error_a_line_of_its_own(self):
        status, out, err = self.run_here(self.serve(reply()), "destroy", "instance", "7", "--raw", stdin="n\n")
        question, told = err.splitlines()
        self.assertEqual((status, out, question[-5:], json.loads(told)["error"]), (2, "", "[y/N]", True))

    def test_addresses_that_make_no_sense(self):
        for port in (-1, "-22", "x", None, 0, 70000, [22], True):
            self.assertEqual(vastai.ssh_addresses({"ssh_host": "h", "ssh_port": port}), [])
        for mapped in ("x", 5, [], [None], ["x"], {"HostPort": 1}, [{"HostPort": "-1"}], [{"HostPort": None}]):
            self.assertEqual(vastai.ssh_addresses({"public_ipaddr": "1.2.3.4", "ports": {"22/tcp": mapped}, "ssh_port": 22,
                                               "ssh_host": "h"}), [("h", 22)])
        self.assertEqual(vastai.ssh_addresses({"ports": "x", "ssh_host": "-h", "ssh_port": 22}), [])

    def test_a_result_that_stalls(self):
        server = self.serve(route=lambda request: stall if request["method"] == "GET" else reply(
            {"success": True, "result_url": f"http://{request['headers']['host']}/result"}))
        status, _, err = self.run_here(server, "logs", "7", "--max-wait", "0.6", "--explain")
        self.assertEqual(status, 9)
        self.assertIn(f"GET {server.url}/result", err)
        self.assertEqual(err.count("Authorization"), 1)

    def test_members_of_another_type(self):
        rows = [{"id": 7, "num_gpus": "2\x1b[31m", "gpu_name": 5, "volume_info": 3}]
        status, out, err = self.run_here(self.serve(reply({"instances": rows, "filters": []})), "show", "instances")
        self.assertEqual((status, "\x1b" in out, "2\\x1b[31mx_5" in out), (0, False, True), err)

    def test_a_log_that_repeats_itself(self):
        self.assertEqual(len(vastai.new_lines(["a"] * 50000, ["b"] * 3 + ["a"] * 49993 + ["c"])), 1)

    def test_pickled(self):
        server = self.serve(reply({"msg": "x"}, 429, Retry_After="90"))
        unknown = vastai.OutcomeUnknownError("m", command="c", found=7)
        for error in (self.error(self.client(server).show_user), unknown, vastai.PartialError("m", results=[{"id": 1}]),
                      self.error(self.client(self.serve(hang_up)).show_user), vastai.UsageError("m", hint="h")):
            again = pickle.loads(pickle.dumps(error))
            self.assertEqual((type(again), str(again), again.status, again.body, again.hint),
                             (type(error), str(error), error.status, error.body, error.hint))
            for name in ("retry_after", "found", "results"):
                self.assertEqual(getattr(again, name, None), getattr(error, name, None))
            self.assertNotIn(KEY.encode(), pickle.dumps(error))


class TestSessions(FaultCase):
    """The key of a 2FA session expires in the middle of a command."""

    def test_a_newer_session_is_used(self):
        """Another process has begun a session meanwhile: its key is taken, not deleted."""
        path = vastai.own_file("config", "vast_tfa_key")
        vastai.write_private(path, "old-session")
        vastai.write_private(vastai.own_file("config", "vast_api_key"), KEY)

        def answers(request):
            if request["headers"]["authorization"] == "Bearer old-session":
                vastai.write_private(path, "new-session")
                return reply({"msg": "Session expired"}, 401)
            return reply(USER)
        server = self.serve(route=answers)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            status = vastai.main(["--url", server.url, "show", "user"])
        self.assertEqual((status, server.requests[-1]["headers"]["authorization"], vastai.read_key(path)),
                         (0, "Bearer new-session", "new-session"))

    def test_a_rental_is_not_made_twice(self):
        vastai.write_private(vastai.own_file("config", "vast_tfa_key"), "session-key")
        vastai.write_private(vastai.own_file("config", "vast_api_key"), KEY)

        def answers(request):
            if request["method"] == "PUT":
                return reply({"success": True, "new_contract": 7})
            if request["headers"]["authorization"] == "Bearer session-key":
                return reply({"success": False, "msg": "Invalid user key"}, 401)
            return reply({"instances": {"id": 7, "actual_status": "running"}})
        server = self.serve(route=answers)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = vastai.main(["--url", server.url, "create", "instance", "5", "--image", "x", "--wait"])
        self.assertEqual((status, [request["method"] for request in server.requests]), (0, ["PUT", "GET", "GET"]))
        self.assertEqual(server.requests[-1]["headers"]["authorization"], f"Bearer {KEY}")
        self.assertIn("session has ended", err.getvalue())
        self.assertFalse(os.path.exists(vastai.own_file("config", "vast_tfa_key")))

    def test_no_key_but_that_of_the_session(self):
        """Nothing goes out without a key, and nobody is told that it does."""
        vastai.write_private(vastai.own_file("config", "vast_tfa_key"), "session-key")
        server = self.serve(reply({"msg": "Invalid user key"}, 401))
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = vastai.main(["--url", server.url, "show", "user"])
        self.assertEqual((status, len(server.requests)), (3, 1))
        self.assertIn("session has ended. Start", err.getvalue())
        self.assertIn("No API key found", err.getvalue())

    def test_the_next_key_is_masked_too(self):
        vastai.write_private(vastai.own_file("config", "vast_tfa_key"), "session-key")
        vastai.write_private(vastai.own_file("config", "vast_api_key"), KEY)

        def answers(request):
            if request["headers"]["authorization"] == "Bearer session-key":
                return reply({"msg": "Invalid user key"}, 401)
            return reply({"msg": f"the key {KEY} may not do that"}, 403)
        server = self.serve(route=answers)
        with contextlib.redirect_stderr(io.StringIO()) as err:
            status = vastai.main(["--url", server.url, "show", "user"])
        self.assertEqual((status, len(server.requests)), (3, 2))
        self.assertNotIn(KEY, err.getvalue())

    def test_only_what_was_refused_goes_again(self):
        vastai.write_private(vastai.own_file("config", "vast_tfa_key"), "session-key")
        vastai.write_private(vastai.own_file("config", "vast_api_key"), KEY)
        for status in (400, 500):
            server = self.serve(reply({"msg": "session expired"}, status))
            with contextlib.redirect_stderr(io.StringIO()):
                vastai.main(["--url", server.url, "create", "team", "--team-name", "t"])
            self.assertEqual(len(server.requests), 1)

    def test_a_wait_goes_on_with_the_key(self):
        vastai.write_private(vastai.own_file("config", "vast_tfa_key"), "session-key")
        vastai.write_private(vastai.own_file("config", "vast_api_key"), KEY)
        states = iter(["loading", "loading", "running"])

        def answers(request):
            if request["headers"]["authorization"] == "Bearer session-key":
                return reply({"msg": "Invalid user key"}, 401)
            return reply({"instances": {"actual_status": next(states)}})
        server = self.serve(route=answers)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            status = vastai.main(["--url", server.url, "wait", "instance", "7", "--poll", "0.01"])
        self.assertEqual((status, len(server.requests), err.getvalue().count("has ended")), (0, 4, 1))


class TestOddAnswers(FaultCase):
    """Members of another type than they should have: an error that says so, never a crash and never success."""

    def test_secrets_that_are_words_of_the_answer(self):
        refusal = {"success": False, "msg": "the offer is gone: success false"}
        for words in (["create", "instance", "5", "--image", "x", "--env", "-e ON_EXIT=success"],
                      ["create", "env-var", "DEBUG", "false"]):
            status, out, err = self.run_here(self.serve(reply(refusal)), *words)
            self.assertEqual((status, out), (1, ""), err)
            self.assertIn("the offer is gone", err)
        client = self.client(self.serve(reply(refusal)))
        self.assertIs(client.create_env_var("DEBUG", "false")["success"], False)
        error = self.error(self.client(self.serve(reply(refusal, 400))).create_env_var, "DEBUG", "false")
        self.assertEqual(error.body, {"success": False, "msg": "the offer is gone: success ***"})
        error = self.error(self.client(self.serve(reply({"code": 4711}, 400))).create_env_var, "PIN", "4711")
        self.assertEqual(error.body, {"code": "***"})
        words = ["create", "instance", "5", "--image", "x", "--env", "-e PYTHONUNBUFFERED=True"]
        self.assertEqual(self.run_here(self.serve(reply(RENTED)), *words).stdout, f"Started. {RENTED}\n")

    def test_what_only_reads_asks_for_no_confirmation(self):
        for text, expected in (('""', "sent an empty answer"), ('"no such endpoint"', "said 'no such endpoint'")):
            for words in (["search", "benchmarks"], ["get", "endpt-logs", "5"]):
                status, out, err = self.run_here(self.serve(reply(text)), *words)
                self.assertEqual((status, out, err), (1, "", f"{' '.join(words[:2])}: the service {expected}\n"))

    def test_what_confirms_that_something_was_done(self):
        """No bare sentence, but where nothing else comes, no success that is not true, and no volume without a name."""
        said, done = '"machine offline"', {"success": True}
        for line, answer, expected in (
                ("transfer credit a@b.c 5 -y", said, 7), ("create volume 7", said, 7), ("take snapshot 7 --repo a/b", said, 7),
                ("create volume 7", done, 7), ("clone volume 7 8", done, 7), ("create endpoint", done, 7),
                ("change bid 7 --price 1", said, 1), ("create template --image x", said, 1), ("stop instance 7", said, 1),
                ("delete volume 7", said, 1), ("delete api-key 7", said, 0), ("update team-role 7 --name x", said, 0),
                ("destroy instance 7 -y", {"success": 0}, 1), ("start instance 7", {"success": None}, 1),
                ("create instance 7 --image x", {"success": 1, "new_contract": 5}, 0),
                ("show api-key 7", {"id": 7, "status": "error"}, 0),
                ("create instance 7 --image x", {"success": None}, 7), ("search offers", {"success": None, "offers": []}, 0),
                ("launch instance --query num_gpus=1 --image x --tries 1", {"success": None, "offers": [{"id": 7}]}, 4),
                ("stop instance 7", {"success": "false", "msg": "machine offline"}, 1),
                ("destroy instance 7 -y", {"status": "error", "msg": "machine offline"}, 1),
                ("create instance 7 --image x", {"success": "false", "new_contract": 8}, 1)):
            with self.subTest(line, answer=answer):
                status, out, err = self.run_here(self.serve(reply(answer)), *line.split())
                self.assertEqual((status, bool(out)), (expected, not expected), err)
                if expected and "offline" in str(answer):
                    self.assertIn("machine offline", err)
        self.error(self.client(self.serve(reply({"success": None}))).destroy_instance, 7)

    def test_an_answer_without_content(self):
        """204 confirms what was to be set or deleted; it is neither what a read promises nor the id of what was made."""
        for line, expected in (("destroy instance 7 -y", 0), ("label instance 7 x", 0), ("show user", 1), ("create api-key --name x", 1),
                               ("show gpu-locations", 1), ("show invoices-v1 --invoices", 1), ("accept price-increase 7 -y", 1)):
            with self.subTest(line):
                status, out, err = self.run_here(self.serve(reply("", 204)), *line.split())
                self.assertEqual((status, bool(out), "empty answer" in err), (expected, not expected, bool(expected)), err)
        self.error(self.client(self.serve(reply({}))).show_gpu_locations)

    def test_numbers_for_hosts_alone(self):
        server = self.serve(reply({"success": True, "needs_machine": True}))
        for name in ("metrics", "trends", "locations"):
            status, out, err = self.run_here(server, "show", "gpu-" + name)
            self.assertEqual((status, out.count("\n"), "for hosts" in err), (0, 1, True), err)

    def test_a_warning_without_stderr(self):
        client, closed = self.client(self.serve(reply(RENTED))), io.StringIO()
        closed.close()
        for stream in (closed, None):
            with contextlib.redirect_stderr(stream), warnings.catch_warnings():
                warnings.simplefilter("always")
                self.assertEqual(client.create_instance(7, "x", env="A=1 --ipc=host"), RENTED)

    def test_a_method_does_not_say_that_it_copied(self):
        client = self.client(self.serve(reply({"success": True, "dst_addr": "a.b", "dst_port": 22})), raw=False)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            client.copy("x", "7:/y")
            client.copy("6:/x", "7:/y")
        self.assertEqual(out.getvalue(), "Now rsync can copy x to 7:/y at a.b.\nCopying 6:/x to 7:/y. "
                                         "Check progress with `vastai show instances`.\n")

    def test_null_is_not_told_as_none(self):
        for line, answer in (("show env-vars", {"secrets": None}), ("tfa status", {"methods": None}), ("show earnings", {"per_day": None}),
                             ("tfa status", {"tfa_enabled": True}), ("show earnings", {"per_machine": []})):
            with self.subTest(line, answer=answer):
                status, out, err = self.run_here(self.serve(reply(answer)), *line.split())
                self.assertEqual((status, out), (1, ""), err)
        self.assertEqual(self.run_here(self.serve(reply({"tfa_enabled": False})), "tfa", "status")[0], 0)

    def test_members_of_another_type(self):
        for words, answer in (
                (["show", "instances"], {"instances": [{"id": 1}], "label_counts": [1]}),
                (["show", "instances", "--raw"], {"instances": [{"id": 1, "extra_env": [[["a"], "b"]]}]}),
                (["search", "offers", "chunked=true"], {"offers": [{"id": 1, "cpu_ram": "64000"}]}),
                (["show", "gpu-locations", "--gpu", "X"], {"locations": [{"gpu_name": [[]]}]}),
                (["show", "invoices"], {"invoices": [{"amount": "1", "timestamp": "x"}]}),
                (["show", "gpu-trends", "X"], {"gpus": {"X": {"stats": [1]}}})):
            with self.subTest(words):
                status, _, err = self.run_here(self.serve(reply(answer)), *words)
                self.assertEqual(status, 0, err)
                self.assertNotIn("defect", err)

    def test_addresses_of_results(self):
        for url in ("http://[bad/", "http://", "ftp://h/x", "http://h:99999/x", "x"):
            server = self.serve(reply({"success": True, "result_url": url}))
            status, out, err = self.run_here(server, "logs", "7")
            self.assertEqual((status, out, len(server.requests)), (1, "", 1), err)
            self.assertIn("address of the result", err)
        server = self.serve(route=lambda request: reply("text") if request["method"] == "GET" else reply(
            {"result_url": f"http://{request['headers']['host']}/a b\u00e9"}))
        self.assertEqual(self.client(server).logs(7), "text")
        self.assertEqual(server.requests[-1]["target"], "/a%20b%C3%A9")

    def test_a_text_that_is_nowhere(self):
        client = self.client(self.serve(reply({"success": True})))
        for call in (lambda: client.logs(7), lambda: client.execute(7, "ls")):
            self.assertIn("where the result is", str(self.error(call)))

    def test_members_that_commands_go_by(self):
        for words, answer, expected in (
                (["reject", "price-increase", "7", "-y"], {"pending_price_increases": [{"contract_id": {}}]}, 4),
                (["accept", "price-increase", "7", "-y"],
                 {"pending_price_increases": [{"contract_id": 7, "pending_price_increase_id": [1]}]}, 4),
                (["stop", "instance", "my run"], {"instances": [{"id": None, "label": "my run"}]}, 1),
                (["stop", "instance", " 7x"], {}, 2),
                (["show", "notifications"], {"id": "x" * 999}, 1),
                (["run", "benchmarks", "--template_id", "5", "--gpus", "A"],
                 {"success": True, "templates": [{"id": 5, "extra_filters": ["x", 5]}]}, 1)):
            status, out, err = self.run_here(self.serve(reply(answer)), *words)
            self.assertEqual((status, out, "defect" in err), (expected, "", False), err)

    def test_numbers_that_came_as_text_line_up(self):
        rows = [{"type": "charge", "amount": amount, "timestamp": 5} for amount in ("1.2345", "20", "odd")]
        out = self.run_here(self.serve(reply({"invoices": rows, "current": {}})), "show", "invoices", "-s", "0").stdout
        self.assertEqual([line.split()[3] for line in out.splitlines()[1:]], ["1.234", "20.000", "odd"])

    def test_several_tables_in_a_pipe_are_one(self):
        gpus = {name: {"supply_demand": {"timestamps": [60], "total": [5]}, "stats": {}} for name in ("A 1", "B")}
        disks = [{"cluster_id": 1, "network_disks": [{"network_disk_id": 7}], "machine_ids": [5], "mounts": {"5": "/m"}},
                 {"cluster_id": 2}]
        for answer, object, firsts in (({"gpus": gpus}, "gpu-trends", ["GPU", "A_1", "B"]),
                                       ({"data": disks}, "network-disks", ["Cluster", "1", "2"])):
            out = self.run_here(self.serve(reply(answer)), "show", object)[1]
            self.assertEqual([line.split()[0] for line in out.splitlines()], firsts)
        self.assertIn("5:/m", out)

    def test_the_last_method_of_2fa(self):
        for answer, told in (({"remaining_methods": 0}, "methods left: 0"), ({}, "2FA is off")):
            out = self.run_here(self.serve(reply({"success": True, **answer})), *"tfa delete -c 1 -y".split())[1]
            self.assertIn(told, out)

    def test_nothing_is_shown_as_none(self):
        for words, answer in ((["tfa", "status"], {"methods": [{"id": 1, "method": "totp"}]}),
                              (["show", "instance-backup-files", "7"], {"files": []}),
                              (["show", "ssh-keys", "-q"], [{"id": None}]),
                              (["show", "invoices-v1", "-i"], {"results": [], "total": None})):
            status, out, err = self.run_here(self.serve(reply(answer)), *words)
            self.assertEqual((status, "None" in out + err), (0, False), out + err)
        status, out, _ = self.run_here(self.serve(reply({"id": 7}), reply({"notification_preferences": {"client": {
            "low": {"\x1b[31mem.ail": True}}}})), "show", "notifications")
        self.assertEqual((status, out.split()), (0, ["Key", "\\x1b[31mem.ail", "client:low", "True"]))


class TestSteps(FaultCase):
    """What commands of several steps say, send and leave behind."""

    def test_one_page_in_other_shapes(self):
        page = reply({"instances": [{"id": 1}], "next_token": "abc", "total_instances": 3})
        for more, expected in ((["--fields", "id", "--raw"], '[\n {\n  "id": 1\n }\n]\n'), (["--format", "csv"], "id\n1\n")):
            status, out, err = self.run_here(self.serve(page), "show", "instances", "--limit", "2", *more)
            self.assertEqual((status, out), (0, expected), err)

    def test_columns_are_looked_at_first(self):
        server = self.serve(reply({"instances": []}))
        self.assertEqual(self.run_here(server, "show", "instances", "--cols", "id,bogus")[0], 2)
        self.assertEqual(server.requests, [])

    def test_the_newer_search(self):
        server = self.serve(reply({"offers": [{"id": 1, "geolocation": "Sweden, SE"}]}))
        status, out, err = self.run_here(server, "search", "offers", "--new", "georegion=true geolocation=EU num_gpus=1")
        self.assertEqual((status, server.requests[0]["method"]), (0, "PUT"), err)
        self.assertIn("Sweden, SE, EU", out)

    def test_a_job_that_is_there(self):
        server = self.serve(reply({"scheduled_job_id": 3, "msg": "conflict"}, 422))
        status, _, err = self.run_here(server, "reboot", "instance", "7", "--schedule", "DAILY", "--day", "*", stdin="n\n")
        self.assertEqual((status, [request["path"] for request in server.requests]),
                         (2, ["/api/v0/commands/schedule_job/"]), err)
        server = self.serve(reply({"scheduled_job_id": 3, "msg": "conflict"}, 422))
        status, _, err = self.run_here(server, "change", "bid", "7", "--schedule", "DAILY", "--day", "*", stdin="n\n")
        self.assertEqual((status, len(server.requests)), (2, 1), err)
        server = self.serve(reply({"scheduled_job_id": [4], "msg": "conflict"}, 422))
        status, _, err = self.run_here(server, "reboot", "instance", "7", "--schedule", "DAILY", "--day", "*", stdin="y\n")
        self.assertEqual((status, len(server.requests)), (1, 1), err)
        server = self.serve(reply({"scheduled_job_id": 3, "msg": "conflict"}, 422), reply({"success": True}))
        status, _, err = self.run_here(server, "change", "bid", "7", "--schedule", "DAILY", "--day", "*", stdin="y\n")
        first, second = (json.loads(request["body"]) for request in server.requests)
        self.assertEqual((status, first, first["day_of_the_week"]), (0, second, None), err)
        self.assertEqual(first["request_body"], {"client_id": "me", "instance_id": 7, "price": None})

    def test_a_key_that_cannot_be_made_again(self):
        with mock.patch.dict(os.environ, PATH=self.home):
            self.assertEqual(self.run_here(self.serve(reply()), "create", "ssh-key", "-y")[0], 127)
        path = os.path.join(self.home, ".ssh", "id_ed25519")
        vastai.write_private(path, "mine")
        server = self.serve(reply())
        self.assertEqual((self.run_here(server, "create", "ssh-key", "-y")[0], server.requests), (2, []))
        self.assertEqual(self.run_here(self.serve(reply()), "create", "ssh-key", "-y", "--curl")[0], 0)
        self.assertEqual(os.listdir(os.path.dirname(path)), ["id_ed25519"])

    def test_curl_of_many(self):
        ids = [str(id) for id in range(1, 131)]
        status, out, _ = self.run_here(self.serve(reply()), "start", "instances", *ids, "--curl")
        self.assertEqual((status, out.count("curl "), ", 130]" in out), (0, 3, True))

    def test_following(self):
        self.assertEqual(self.run_here(self.serve(reply()), "logs", "7", "-f", "--raw")[0], 2)
        logs = [0]

        def answers(request):
            if request["method"] == "PUT":
                logs[0] += 1
                return reply({"result_url": f"http://{request['headers']['host']}/log"} if logs[0] < 3 else {})
            if request["target"] == "/log":
                return reply(f"line {logs[0]}\n")
            return reply({"instances": {"actual_status": "running"}} if logs[0] < 3 else {}, 200 if logs[0] < 3 else 404)
        with mock.patch.object(time, "sleep"):
            status, out, err = self.run_here(self.serve(route=answers), "logs", "7", "-f")
        self.assertEqual((status, out), (0, "line 1\nline 2\n"), err)

    def test_long_questions_are_asked_whole(self):
        ids = [str(10 ** 7 + n) for n in range(64)]
        status, _, err = self.run_here(self.serve(reply()), "destroy", "instances", *ids, stdin="n\n")
        self.assertEqual((status, ids[-1] in err, "[y/N]" in err), (2, True, True))

    def test_price_increases(self):
        server = self.serve(reply({"pending_price_increases": [{"contract_id": 7, "pending_price_increase_id": 3}]}),
                            reply({"success": True}))
        status, out, err = self.run_here(server, "accept", "price-increase", "7", "-y")
        self.assertEqual((status, out), (0, "Instance 7: price increase 3 accepted\n"), err)

    def test_a_key_set_for_one_call(self):
        client = self.client(self.serve(reply()))
        client.set_api_key("another-key-123", quiet=True)
        self.assertEqual(client.api_key, "another-key-123")


class TestOutcomes(FaultCase):
    """What went well stays said, whatever goes wrong behind it."""

    def test_interrupted_while_it_is_said(self):
        """What was made although it was refused is said all the same."""
        server = self.serve(reply({"success": False, "msg": "the bid is too low", "new_contract": 4242}, 400))
        said = io.StringIO()

        class Interrupting(io.StringIO):
            def write(self, text):
                if not said.getvalue():
                    said.write("once\n")
                    signal.raise_signal(signal.SIGINT)
                return said.write(text)
        with contextlib.redirect_stderr(Interrupting()):
            status = vastai.main(["create", "instance", "7", "--image", "i", "--url", server.url, "--api-key", KEY])
        self.assertEqual(status, 130)
        self.assertIn("vastai destroy instance 4242", said.getvalue())

    def test_a_rental_whose_start_cannot_be_watched(self):
        for step in (reply({"success": False, "msg": "busy"}), reply("<html>"), reply({}, 401), reply({}, 403)):
            def answers(request, step=step):
                return reply({"success": True, "new_contract": 4242}) if request["method"] == "PUT" else step
            with fast_clock():
                error = self.error(self.client(self.serve(route=answers)).create_instance, 7, image="x", wait=True)
            self.assertIn("4242 is rented and is billed until `vastai destroy instance 4242` ends it", str(error))
            self.assertNotIsInstance(error, vastai.UsageError)
        client = self.client(self.serve(route=lambda request: reply({"success": True}) if request["method"] == "DELETE"
                                        else reply({"success": False, "msg": "busy"})))
        self.assertIn("cannot be checked", str(self.error(client.destroy_instance, 7, wait=True)))
        for odd in ({"new_contract": "abc"}, {}):
            error = self.error(self.client(self.serve(reply({"success": True, **odd}))).create_instance, 7, image="x",
                               wait=True)
            self.assertEqual((type(error), "named no instance" in str(error)), (vastai.OutcomeUnknownError, True))

    def test_looks_that_fail_for_a_while(self):
        steps = [reply({}, 500), hang_up, reply({}, 503), reply({"instances": {"actual_status": "running"}})]
        client = self.client(self.serve(*steps), retry=5)
        self.assertEqual(client.wait_instance(7, poll=0.01)["actual_status"], "running")

    def test_a_wait_does_not_outlast_its_time(self):
        server = self.serve(stall)
        self.error(self.client(server, timeout=4, retry=3).wait_instance, 7, max_wait=0.6, poll=0.01)
        self.assertFalse(len(server.requests) > 2, "each look takes what time is left, and no more")

    def test_parts_of_unknown_outcome(self):
        ids = list(range(1, 66))
        error = self.error(self.client(self.serve(reply({"msg": "bad offer"}, 400), reply({}, 504))).create_instances, ids,
                           image="x")
        self.assertIs(type(error), vastai.OutcomeUnknownError)
        for odd in (reply({"msg": "no"}, 500), reply("<html>")):
            for parts in ((reply({"msg": "bad offer"}, 400), odd), (odd, reply({"msg": "bad key"}, 401))):
                error = self.error(self.client(self.serve(*parts)).create_instances, ids, image="x")
                self.assertEqual((type(error), {entry["success"] for entry in error.results}),
                                 (vastai.PartialError, {False, None}))
                self.assertIn("vastai show instances", str(error))
        made = reply({"success": True, "new_contracts": list(range(101, 165))})
        error = self.error(self.client(self.serve(made, reply({}, 504))).create_instances, ids, image="x")
        self.assertEqual((type(error), error.results[-1]["success"]), (vastai.PartialError, None))
        pending = [{"contract_id": id, "pending_price_increase_id": id} for id in (1, 2)]
        status, out, err = self.run_here(self.serve(reply({"pending_price_increases": pending}), reply({"msg": "no"}, 400),
                                               reply({}, 504)), "accept", "price-increase", "1", "2", "-y")
        self.assertEqual((status, [row["status"] for row in json.loads(out)], "unknown: 2" in err),
                         (8, ["failed", "unknown"], True))

    def test_a_label_with_blanks(self):
        listing = reply({"instances": [{"id": 4242, "label": "train ", "start_date": time.time()}]})
        client = self.client(self.serve(route=lambda request: reply({}, 504) if request["method"] == "PUT" else listing))
        self.assertEqual(self.error(client.create_instance, 7, image="x", label="train ").found, 4242)

    def test_a_job_that_is_not_made(self):
        server = self.serve(reply({"msg": "bad hour"}, 400))
        error = self.error(self.client(server).reboot_instance, 5, schedule="DAILY", day="*", hour="3")
        self.assertEqual((error.msg, len(server.requests)), ("bad hour", 1))

    def test_a_lost_delete(self):
        error = self.error(self.client(self.serve(hang_up, reply({"msg": "gone"}, 404))).destroy_instance, 7)
        self.assertEqual((type(error), "earlier attempt" in str(error)), (vastai.NotFoundError, True))

    def test_announcements_of_an_answer(self):
        early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
        client = self.client(self.serve(early + reply({"success": True, "new_contract": 4242}), early + reply({"id": 2})))
        self.assertEqual(client.create_instance(7, image="x")["new_contract"], 4242)
        self.assertEqual(client.show_user(), {"id": 2})

    def test_what_a_self_test_rents_is_removed(self):
        """If it is known which one that is: the only one that has come since."""
        offers = reply({"offers": [{"id": 5, "machine_id": 3}]})
        lost = (reply("<html>"), reply("null"), reply({"success": True}), reply({}, 504), reply({}, 500))
        for step, age in [*zip(lost, [1200] * 5), (hang_up, 0)]:
            def answers(request, step=step, age=age):
                if request["method"] == "PUT":
                    return step
                if request["method"] == "DELETE":
                    return reply({"success": True})
                if "bundles" in request["target"]:
                    return offers
                if request["path"].startswith("/api/v0/instances/424"):
                    return reply({"instances": None})
                row = {"id": 4242, "label": "vast-self-test-machine-3", "start_date": time.time()}
                return reply({"instances": [row, {**row, "id": 4241, "start_date": time.time() - age}]})
            server = self.serve(route=answers)
            options = {"ignore_requirements": True, "no_support_bundle": True}
            with mock.patch.object(time, "sleep"):
                if age:
                    self.assertIs(self.client(server).self_test_machine(3, **options)["success"], False)
                else:
                    error = self.error(self.client(server).self_test_machine, 3, **options)
                    self.assertRegex(error.msg, "several have appeared: 4242, 4241.*`vastai show instances`")
            gone = [request["target"] for request in server.requests if request["method"] == "DELETE"]
            self.assertEqual(gone, ["/api/v0/instances/4242/"] if age else [])

    def test_an_endpoint_without_an_id_is_given_back(self):
        made = []

        def answers(request):
            if request["method"] == "POST" and "endptjobs" in request["target"]:
                made.append(json.loads(request["body"])["endpoint_name"])
                return reply({"success": True, "result": "x"})
            if request["method"] == "DELETE":
                made.clear()
                return reply({"success": True})
            return reply({"templates": [{"id": 5}], "offers": [{"id": 1}], "benchmarks": [], "success": True,
                          "results": [{"id": 77, "endpoint_name": name} for name in made]})
        server = self.serve(route=answers)
        with mock.patch.object(time, "sleep"):
            error = self.error(self.client(server).run_benchmarks, template_id=5, gpus="RTX_4090", no_cache=True)
        self.assertIs(type(error), vastai.OutcomeUnknownError)
        self.assertEqual([request["target"] for request in server.requests if request["method"] == "DELETE"],
                         ["/api/v0/endptjobs/77/"])

    def test_what_benchmarks_rent_is_given_back(self):
        """Also where the service's list of workers makes no sense, and where a part of it all cannot be made."""
        for workers, second in (([{"status": "idle"}], reply({"success": True, "id": 102})),
                                ([{"id": 9, "status": "idle", "measured_perf": "x"}], reply({"success": True, "id": 102})),
                                ([], reply({"msg": "too many"}, 400))):
            def answers(request, workers=workers, second=second):
                target = request["target"].partition("?")[0]
                if request["method"] == "DELETE":
                    return reply({"success": True})
                if request["method"] == "POST" and "endptjobs" in target:
                    return reply({"success": True, "result": 101})
                if request["method"] == "POST" and "autojobs" in target:
                    return second
                return reply({"templates": [{"id": 5}], "offers": [{"id": 1}], "workers": workers, "results": [],
                              "benchmarks": [], "success": True})
            server = self.serve(route=answers)
            with mock.patch.object(time, "sleep"), contextlib.suppress(vastai.VastAIError):
                self.client(server).run_benchmarks(template_id=5, gpus="RTX_4090", timeout=0.2, no_cache=True)
            gone = [request["target"] for request in server.requests if request["method"] == "DELETE"]
            self.assertIn("/api/v0/endptjobs/101/", gone)
            self.assertEqual("/api/v0/autojobs/102/" in gone, second[:12] == b"HTTP/1.1 200")


class TestLines(FaultCase):
    """How a line is read, and in which shapes its answer can be had."""

    def test_names_that_are_none(self):
        server = self.serve(reply({"success": True, "new_contract": 7}))
        for words in (["create", "instance", "8", "--image", ""], ["create", "instance", "8", "--image", "two words"],
                      ["create", "instance", "8", "--template_hash", " "], ["create", "env-var", "A=b", "c"],
                      ["launch", "instance", "-g", "A", "-n", "1", "-i", ""],
                      ["launch", "instance", "--query", "num_gpus=x", "-i", "a"]):
            self.assertEqual(self.run_here(server, *words)[0], 2, words)
        self.assertEqual(server.requests, [])

    def test_direct_alone(self):
        """It changes the access that a template has, and is not dropped without a word where there is none."""
        server = self.serve(reply({"success": True, "new_contract": 7, "template": {"id": 5, "hash_id": "h"}}))
        for line in ("create instance 7 --image a/b --direct", "create template --name x --image a/b --direct"):
            status, _, err = self.run_here(server, *line.split())
            self.assertEqual((status, "direct has no effect" in err), (0, True), err)
        for present, sent in (("ssh", {"runtype": "ssh", "use_ssh": True, "ssh_direct": True, "jup_direct": False}),
                              ("jupyter", {"runtype": "jupyter", "use_ssh": True, "ssh_direct": False, "jup_direct": True})):
            rows = [{"id": 5, "hash_id": "h", "runtype": present, "use_ssh": True}]
            server = self.serve(reply({"templates": rows}), reply({"success": True, "template": {"id": 5, "hash_id": "i"}}))
            status, _, err = self.run_here(server, *"update template h --direct".split())
            self.assertEqual((status, err), (0, ""))
            body = json.loads(server.requests[-1]["body"])
            self.assertEqual({name: body.get(name) for name in sent}, sent)
        server = self.serve(reply({"templates": [{"id": 5, "hash_id": "h", "runtype": "args"}]}))
        self.assertEqual(self.run_here(server, *"update template h --direct".split())[0], 2)

    def test_what_runs_at_the_start(self):
        """A file wins over --onstart-cmd, that over --entrypoint; what has no effect is named."""
        script = os.path.join(self.home, "on.sh")
        with open(script, "w") as file:
            file.write("true\n")
        server = self.serve(reply({"success": True, "new_contract": 7}))
        for options, sent, told in (
                (f"--onstart-cmd A --entrypoint B --onstart {script}", "true\n", 2), ("--entrypoint B --onstart-cmd A", "A", 1),
                ("--entrypoint B", "B", 0)):
            for line in ("create instance 7 --image a/b ", "launch instance -g X -n 1 -i a/b "):
                with self.subTest(line + options):
                    status, _, err = self.run_here(server, *shlex.split(line + options))
                    self.assertEqual((status, err.count("takes precedence over")), (0, told), err)
                    self.assertEqual(json.loads(server.requests[-1]["body"])["onstart"], sent)

    def test_nothing_that_is_given_is_dropped_or_rounded(self):
        server, image = self.serve(reply({"success": True})), "create instance 7 --image a/b"
        for line, told in (
                ("execute 7 'rm -rf /x' --hour 5 --day '*'", "needs --schedule"), ("reboot instance 7 --hour 0", "--hour needs"),
                ("reboot instance 7 --start_date 2030-01-01", "needs --schedule"),
                ("change bid 7 --end_date 2030-01-01", "needs --schedule"),
                ("cloud copy --src a --dst b --instance 1 --connection 2 --day '*'", "needs --schedule"),
                ("launch instance --query num_gpus=1 -r Europe -i a/b", "--region"),
                (image + " --max-hours 1e16", "at most 100 years"),
                ("show invoices -c -p", "--only_credits"), ("show invoices-v1 -i -ct instance", "--charge-type needs --charges"),
                ("show invoices-v1 -c -it stripe", "--invoice-type"), ("delete deployment 7 --tag x", "--tag needs --name"),
                ("create subaccount --email a@b.c --username x --password y --type hots", "expected host or client"),
                ("list machine 7 -r 40", "0.4 for 40%"), ("list machine 7 -e 2020-01-01", "in the future"),
                ("list volume 7 -e 2020-01-01", "in the future"),
                ("transfer credit a@b.c 19.999 -y", "whole cents"), ("transfer credit -r a@b.c -a 0.004 -y", "whole cents"),
                ("prepay instance 7 19.999", "whole cents"), ("create team --team-name x --transfer-credit .001", "whole cents"),
                ("search offers georegion!=false", "georegion=true"), ("search offers 'georegion in [true]'", "georegion=true"),
                ("search offers chunked!=false", "chunked=true"),
                ("create template --image a/b --search_params 'georegion=true gpu_ram>5'", "needs a region"),
                ("search offers gpu_name!=A,B", "gpu_name notin [A,B]"), ("search offers gpu_name=A,B", "gpu_name in [A,B]")):
            with self.subTest(line):
                status, out, err = self.run_here(server, *shlex.split(line))
                self.assertEqual((status, out), (2, ""), err)
                self.assertIn(told, " ".join(err.split()))
        client = self.client(server)
        for call, given in ((client.execute, {"command": "ls", "hour": 5}), (client.reboot_instance, {"start_date": "2030-01-01"})):
            self.assertIsInstance(self.error(call, 7, **given), vastai.UsageError)
        self.assertEqual(server.requests, [])
        client.reboot_instance(7, day="0", hour="0", start_date=None)  # as a program that names every default
        err = self.run_here(server, *"create instance 7 --template_hash x --jupyter --direct".split())[2]
        self.assertIn("the template sets the access", err)

    def test_help_in_every_spelling(self):
        server = self.serve(reply({"success": True}))
        for more in ("--help", "--hel", "-h", "-qh", "--vers"):
            status, out, err = self.run_here(server, "stop", "instance", "7", more)
            self.assertEqual((status, err, out == vastai.__version__ + "\n" or "usage: vastai stop instance" in out),
                             (0, "", True))
        self.assertEqual(server.requests, [])

    def test_misspelt_commands(self):
        for line, meant in (("-q shwo instances", "show instances"), ("--raw serch offers", "search offers"),
                            ("help serch offers", "search offers"), ("serch offers --help", "search offers")):
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                status = vastai.main(line.split())
            self.assertEqual((status, out.getvalue(), f"did you mean {meant!r}" in err.getvalue()), (2, "", True),
                             err.getvalue())
        for line in ("--raw foo", "foo --help", "help foo"):
            self.assertEqual(self.run_here(None, *line.split())[:2], (2, ""))
        self.assertEqual(self.run_here(None, "help", "show")[0], 0)

    def test_help_fits_the_terminal(self):
        for width in (60, 80, 100, 200):
            with mock.patch.dict(os.environ, COLUMNS=str(width)):
                pages = [vastai.command_help(row) for row in vastai.COMMANDS.values() if row.face != "sdk"]
                for page in (*pages, vastai.overview(), vastai.overview("show"), vastai.start_page()):
                    self.assertLessEqual(max(map(len, page.split("\n"))), width, page)
                self.assertLessEqual(vastai.start_page().count("\n"), 22)
        with mock.patch.dict(os.environ, COLUMNS="60"):
            example = vastai.command_help(vastai.COMMANDS["create template"]).partition("Examples:\n")[2].partition("\n\n")[0]
        words = shlex.split(example.replace("\\\n", " "))
        self.assertEqual(words[1:], ["create", "template", *shlex.split(vastai.COMMANDS["create template"].examples.split("\n")[0])])

    def test_docstrings_speak_of_parameters(self):
        for row in vastai.METHODS.values():
            text = vastai.docstring(row)
            for arg in row.args:
                self.assertFalse(arg.option and f"{arg.flags[-1]} " in f"{text} ", (row.name, arg.flags))
            self.assertNotRegex(text, r"fields below|`vastai (show|destroy|create) ")
        self.assertIn("    gpu_name: model", vastai.VastAI.search_offers.__doc__)
        self.assertNotIn("    gpu_name: model", vastai.VastAI.show_user.__doc__)

    def test_words_of_a_line_as_a_shell_reads_them(self):
        for line in ("a  b\tc", "a 'b c' \"d e\"", "'' \"\"", "a\\ b", '"a\\"b" \'c\\d\'', '"\\x"', "a'b'c\"d\"", "a\\\n"):
            self.assertEqual(vastai.shell_words(line), shlex.split(line))
        for line in ("'a", 'a "b', "a\\", '"\\'):
            self.assertRaises(ValueError, vastai.shell_words, line)
        self.assertEqual(vastai.shell_words("x" * 1_000_000), ["x" * 1_000_000])  # shlex takes fifteen seconds

    def test_options_between_the_words_of_a_command(self):
        for line in ("show --raw instances", "--raw show -q instances", "show --url http://x:1 instances",
                     "show --status running instances", "-q -- show instances"):
            self.assertEqual(vastai.find_command(line.split())[0].name, "show instances", line)
        for line in ("show --raw", "show x instances", "stop --raw x instance 7"):
            self.assertIsNone(vastai.find_command(line.split())[0], line)

    def test_what_is_not_understood_is_named_without_its_value(self):
        for line, told in (("search offers --api-kye=SECRET", "no option '--api-kye'; did you mean '--api-key'?"),
                           ("search offers --api-keySECRET", "no option '--api-key'"),
                           ("take snapshot 5 --docker_login=SECRET", "--docker-login is ambiguous"),
                           ("create template --docker_login_passSECRET", "no option '--docker_login_pass'"),
                           ("take snapshot 5 --docker_login_pass -SECRET", "--docker_login_pass: expected a value"),
                           ("create env-var N -SECRET", "no such option; write -- before a value"),
                           ("create env-var N --SECRET", "no such option; write -- before a value"),
                           ("create env-var N x --quite=SECRET", "begins with -; did you mean '--quiet'?\n"),
                           ("set api-key -SECRET", "no such option; write -- before a value"),
                           ("set api-key my SECRET", "unexpected words"), ("show user --raw=SECRET", "takes no value"),
                           ("search offers --on_demand=SECRET", "takes no value"),
                           ("create instance 7 --image i --env TOKEN=x SECRET", "unexpected words"),
                           ("tfa login SECRET", "unexpected words"), ("tfa regen-codes SECRET", "unexpected words"),
                           ("create env-var TOKEN=SECRET x", "not 'TOKEN…'"), ("update env-var TOKEN=SECRET x", "not 'TOKEN…'"),
                           ("delete env-var TOKEN=SECRET", "not 'TOKEN…'"),
                           ('set user --file {"password":"SECRET"}', "not JSON itself"),
                           ("show user 1SECRET2SECRET34", "unexpected '…'"), ("set-apikey 1SECRET2SECRET34", "no command 'set-apikey …'"),
                           ("login 1SECRET2SECRET34", "did you mean 'set api-key'"),
                           ("x" + "SECRET" * 10, "no such command")):
            status, out, err = self.run_here(None, *line.split())
            self.assertEqual((status, out, told in err, "SECRET" in err, err.count("-S")), (2, "", True, False, 0), err)

    def test_one_word_for_one_limit(self):
        for flag, value, expected in (("--timeout", "0", "seconds greater than 0"), ("--timeout", "1x", "seconds greater than 0"),
                                      ("--timeout", "-1", "seconds greater than 0"), ("--retry", "0", "1 or more"),
                                      ("--retry", "x", "1 or more")):
            status, out, err = self.run_here(None, "show", "user", flag, value)
            self.assertEqual((status, out, f"{flag}: expected" in err, expected in err), (2, "", True, True), err)
            error = self.error(vastai.VastAI, KEY, **{flag[2:]: value})
            self.assertIn(expected, str(error))

    def test_which_errors_are_json(self):
        for line in ("show user --raw", "--raw show user", "show --ra user x", "show user --format json",
                     "show user --format=json --nonsense", "--raw", "--raw nonsense", "--format json --nonsense", "--form json show x",
                     "show invoices-v1 -i --format json"):
            self.assertTrue(vastai.wants_json(line.split()), line)
        for line in ("show user", "ssh 7 tool --raw", "create instance 7 --image i --args --raw", "show user --format csv",
                     "show user --format table --nonsense", "execute 7 -- --raw", "nonsense"):
            self.assertFalse(vastai.wants_json(line.split()), line)

    def test_secrets_from_stdin(self):
        for line in ("create env-var NAME -", "take snapshot 7 --repo a/b --docker_login_pass -",
                     "create env-var --raw NAME -"):
            server = self.serve(reply({"success": True}))
            status, out, err = self.run_here(server, *line.split(), stdin="hush-hush\n")
            self.assertEqual(status, 0, err)
            self.assertIn("hush-hush", server.requests[-1]["body"].decode())
            self.assertNotIn("hush", out + err)
            self.assertEqual(self.run_here(server, *line.split(), stdin="")[0], 2)

    def test_lines_of_csv(self):
        row = {"a": "x\ry", "b": 'say "hi", you', "c": "null \0", "d": None, "e": {"k": [1]}, "f": 1.5, "g": True}
        server = self.serve(*[reply({"results": [row]}) for _ in range(3)])
        text = self.run_here(server, "show", "invoices-v1", "-i", "--format", "csv")[1]
        self.assertEqual(text, 'a,b,c,d,e,f,g\n"x\ry","say ""hi"", you",null \0,,"{""k"": [1]}",1.5,True\n')
        nested = self.serve(reply({"results": [{"id": {"b": None}, "a.b": 5}, {}]}))
        for form, expected in (("table", "id.b  a.b\n-       5\n-       -\n"), ("csv", "id.b,a.b\n,5\n,\n")):
            words = ["show", "invoices-v1", "-i", "--format", form, "--fields"]
            self.assertEqual(self.run_here(nested, *words, "id.b,a.b")[:3], (0, expected, ""))
            self.assertEqual(self.run_here(nested, *words, "id.c,ID").stderr,
                             "--fields: no row has 'id.c'\n--fields: no row has 'ID'; did you mean 'id'?\n")
        server_of_offers = self.serve(reply({"offers": [{"id": 7, "dph_total": 0.5}]}))
        self.assertIn("did you mean 'dph_total'?", self.run_here(server_of_offers, "search", "offers", "--fields", "dph").stderr)
        status, out, err = self.run_here(server, "show", "invoices-v1", "-i", "--fields", " , ")
        self.assertEqual((status, out, "expected field names" in err), (2, "", True), err)
        text = self.run_here(server, "show", "invoices-v1", "-i", "--format", "tsv", "--fields", "a,b")[1]
        self.assertEqual(text, 'a\tb\n"x\ry"\t"say ""hi"", you"\n')
        self.assertEqual(self.run_here(server, "show", "invoices-v1", "-i", "--format", "csv", "--fields", "d")[1], 'd\n""\n')

    def test_habits(self):
        for line, told in (("login", "set api-key"), ("auth", "set api-key"), ("ls", "show instances"),
                           ("ps", "show instances"), ("rm 5", "destroy instance"), ("version", "--version"),
                           ("change-bid 11 0.35", "change bid"), ("ssh-key", "show ssh-keys"), ("show-instances",
                            "show instances"), ("instances", "show instances"), ("delete instance 5", "destroy instance"),
                           ("list offers", "search offers"), ("search offers --sort dph", "--order"), ("show env", "show env-vars"),
                           ("show instances --sort id", "--order-by"), ("show user --json", "--raw"), ("start 5", "start instance"),
                           ("terminate 5", "destroy instance"), ("status", "show instances")):
            status, out, err = self.run_here(None, *line.split())
            self.assertEqual((status, out, f"did you mean {told!r}?" in err), (2, "", True), err)
        self.assertIn("takes no value", self.run_here(None, "show", "user", "-q=")[2])
        for flag in ("--gpu-name", "--gpu_name=A", "--num-gpus"):
            self.assertIn("write it as a condition: '", self.run_here(None, "search", "offers", flag)[2])
        for order in (["-o", "-dph"], ["--order", "-dph"], ["--order=-dph"], ["-o-dph"]):
            status, out, err = self.run_here(None, "search", "offers", *order, "--curl")
            self.assertEqual((status, '"order": [["dph_total", "desc"]]' in out), (0, True), err)
        self.assertEqual(self.run_here(None, "search", "offers", "-o", "-n", "--curl")[0], 2)
        self.assertIn("OFFER: expected an id", self.run_here(None, "create", "instance", "x")[2])
        flags = {flag for row in (*vastai.COMMANDS.values(), vastai.GLOBAL_ARGS) for arg in row.args for flag in arg.flags}
        for habit, targets in vastai.HABITS.items():
            for target in targets.split() if habit.startswith("--") else [targets]:
                self.assertTrue(target in vastai.NAMES or target in flags, target)
            self.assertNotIn(habit, vastai.NAMES)
        for line, told in (("label instance 5 --label X", "vastai label instance INSTANCE LABEL"),
                           ("prepay instance 5 --amount 50", "vastai prepay instance INSTANCE AMOUNT")):
            self.assertIn(told, self.run_here(None, *line.split())[2])
        self.assertIn("separated by spaces", self.run_here(None, "search", "offers", "num_gpus>=2 and dph<1")[2])
        self.assertIn("set min-bid MACHINE --price USD", self.run_here(None, "set", "min-bid", "7")[2])
        for line in ("destroy instance 5 --wait", "search offers --zzz", "frobnicate", "show nothing"):
            self.assertNotIn("did you mean", self.run_here(None, *line.split())[2].replace("destroy instance: ", ""))

    def test_shapes(self):
        bill = reply({"results": [{"type": "invoice", "amount": 5}], "total": 1})
        methods = reply({"methods": [{"id": 1, "method": "totp"}]})
        for step, line, expected in (
                (bill, "show invoices-v1 -i --format csv", "amount,type\n5,invoice\n"),
                (bill, "show invoices-v1 -i --format json --fields amount", '[\n {\n  "amount": 5\n }\n]\n'),
                (methods, "tfa status --fields id,method --format tsv", "id\tmethod\n1\ttotp\n"),
                (methods, "tfa status -q", "1\n"), (reply("[]"), "show ssh-keys --format csv", ""),
                (reply({"gpus": {}}), "show gpu-trends RTX_9999 --format csv", ""),
                (reply({"success": True, "workers_to_update": 2}), "update workers 7",
                 "Updating workers of workergroup 7: 2.\n")):
            status, out, err = self.run_here(self.serve(step), *line.split())
            self.assertEqual((status, out), (0, expected), err)
        self.assertEqual(self.run_here(self.serve(bill), "show", "invoices-v1", "-i", "-q")[0], 0)
        for words in ("show user -q", "show subaccounts --quiet"):
            step = reply({"id": 7, "username": "a", "users": [{"id": 7, "username": "a"}]})
            self.assertEqual(self.run_here(self.serve(step), *words.split())[1:], ("7\n", ""))
        server = self.serve(reply({"id": 7}), reply({"notification_preferences": {"client": {"low": {"email": True}}}}))
        self.assertEqual(self.run_here(server, "show", "notifications", "--format", "csv")[1], "email,key\nTrue,client:low\n")

    def test_shapes_of_a_partial_failure(self):
        server = self.serve(route=lambda request: reply({"extended": 0}) if json.loads(request["body"])["machine"] == 3
                            else reply({"msg": "no"}, 400))
        status, out, _ = self.run_here(server, "list", "machines", "3", "5", "-g", "0.5", "--format", "csv", "--fields", "id,msg")
        self.assertEqual((status, out), (8, "id,msg\n3,\n5,no\n"))

    def test_a_curl_line_without_its_secret_says_so(self):
        status, out, err = self.run_here(self.serve(reply()), "create", "env-var", "A", "b", "--curl")
        self.assertEqual((status, '"value": "***"' in out, "***" in err), (0, True, True))
        words = ("create", "instance", "7", "--image", "i", "--env", "-p 8080:80", "--curl")
        self.assertEqual(self.run_here(self.serve(reply()), *words)[2], "")


class TestArguments(FaultCase):
    """Values at the edge of what an argument takes."""

    def sent(self, name, *args, **given):
        server = self.serve(reply({"results": [], "offers": [], "benchmarks": []}))
        with contextlib.suppress(vastai.VastAIError):  # of the answer, which is not forevery command
            getattr(self.client(server), name)(*args, **given)
        request = server.requests[-1]
        query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(request["target"]).query))
        return {name: json.loads(value) if value[:1] in "[{" else value for name, value in query.items()} or json.loads(
            request["body"])

    def test_the_first_second(self):
        period = self.sent("show_invoices_v1", start_date=0, end_date="1970-01-02")["select_filters"]["when"]
        self.assertEqual(period, {"gte": 0, "lte": 86400})
        self.assertEqual(self.sent("show_earnings", start_date=0, end_date=86400)["sday"], "0")

    def test_dates_too_far_away(self):
        client = self.client(self.serve(reply()))
        for name, args in (("show_invoices_v1", dict(start_date="99999999999999")),
                           ("schedule_maint", dict(id=1, sdate="1899900000000", duration=1)),
                           ("schedule_maint", dict(id=1, sdate=1899900000000, duration=1))):
            self.assertIsInstance(self.error(getattr(client, name), **args), vastai.UsageError)

    def test_odd_queries_and_orders(self):
        self.assertEqual(self.sent("search_volumes", query={"machine_id": {}})["machine_id"], {})
        sent = self.sent("launch_instance", "A", "1", "a/b", region="US", query={"machine_id": {"eq": 5}})  # in place of them
        self.assertEqual((sent["q"]["machine_id"], "gpu_name" in sent["q"]), ({"eq": 5}, False))
        self.assertIsInstance(self.error(self.client("http://unused").search_offers, query=[1j]), vastai.UsageError)
        self.assertEqual(self.sent("search_offers", order=["dph", ["id", "desc"]])["order"],
                         [["dph_total", "asc"], ["id", "desc"]])
        self.assertEqual(self.sent("search_benchmarks", order=["value-"])["order_by"], [{"col": "value", "dir": "desc"}])
        for portal in (5, ""):
            self.assertEqual(self.sent("create_instance", 5, image="x", env={"PORTAL_CONFIG": portal})["env"],
                             {"PORTAL_CONFIG": str(portal)})

    def test_conditions_side_by_side(self):
        self.assertEqual(vastai.parse_query('geolocation in [US,CA]num_gpus=2 gpu_name="RTX 4090"disk_space>5'), {
            "geolocation": {"in": ["US", "CA"]}, "num_gpus": {"eq": "2"}, "gpu_name": {"eq": "RTX 4090"},
            "disk_space": {"gt": "5"}})
        self.assertEqual(vastai.parse_query("verified=any, rentable=[any]", {"verified": {"eq": True}}), {})
        self.assertEqual(self.sent("search_invoices", "paid_on=null")["select_filters"], {"paid_on": {"eq": None}})

    def test_arguments_of_the_entrypoint(self):
        self.assertEqual(self.sent("create_instance", 5, image="x", args="a b")["args"], "a b")
        self.assertEqual(self.sent("create_instance", 5, image="x", args=["a", "b"])["args"], ["a", "b"])
        sent = self.sent("create_instance", 5, image="x", args=[""], onstart_cmd="")
        self.assertEqual((sent["runtype"], "args" in sent, sent["onstart"]), ("args", False, ""))

    def test_zero_is_a_size(self):
        for given, size in (({}, 15), ({"volume_size": 0}, 0)):
            sent = self.sent("create_instance", 5, image="x", create_volume=7, mount_path="/a", **given)
            self.assertEqual(sent["volume_info"]["size"], size)

    def test_false_is_a_change(self):
        self.assertEqual(self.sent("tfa_update", 7, set_primary=False), {"tfa_method_id": 7, "is_primary": False})
        self.assertEqual(self.sent("update_template", "h", private=False)["select_filters"], {"hash_id": {"eq": "h"}})
        for given in ({"ssh": False}, {"no_default": True}):
            self.assertIsInstance(self.error(self.client("http://unused").update_template, "h", **given), vastai.UsageError)

    def test_words_beside_their_options(self):
        """A transfer is never guessed at, though the official client lets its options win."""
        server = self.serve(reply({"success": True}))
        for words in ("x@y.z 5 -a 50", "x@y.z 5 -r a@b.c", "x@y.z 5 -r a@b.c -a 7", "5 -r a@b.c"):
            status, _, err = self.run_here(server, *f"transfer credit {words} --skip".split())
            self.assertEqual((status, server.requests), (2, []), err)
            self.assertIn("give either", err)

    def test_prices_of_a_listing_have_units(self):
        server = self.serve(reply({"success": True}))
        out = self.run_here(server, *"set defjob 7 --price_gpu 0.05 --price_inetu 0.00125 --price_inetd 2e-5".split())[1]
        self.assertIn("price_gpu $0.05/GPU/day, price_inetu $0.00125/GB, price_inetd $0.00002/GB", out)

    def test_prefixes_of_options(self):
        for line, name, value in (("create instance 7 --image i --bid 0.2", "price", 0.2),
                                  ("create template --disk 8", "recommended_disk_space", "8"),
                                  ("delete template --hash h", "hash_id", "h")):
            server = self.serve(reply({"success": True, "new_contract": 1}))
            status, _, err = self.run_here(server, *line.split())
            self.assertEqual((status, json.loads(server.requests[0]["body"])[name]), (0, value), err)
        status, _, err = self.run_here("http://unused", "create", "instance", "7", "--vol", "5")
        self.assertEqual((status, "ambiguous" in err), (2, True), err)

    def test_empty_options_are_not_given(self):
        for line in ("logs 5 --tail '' --filter ''", "show instances -t ''", "show invoices-v1 -i -t ''"):
            server = self.serve(route=lambda request: reply(
                {"instances": [], "results": [], "result_url": f"http://{request['headers']['host']}/log"}))
            status, _, err = self.run_here(server, *shlex.split(line))
            self.assertEqual(status, 0, err)
            sent = server.requests[0]["target"] + server.requests[0]["body"].decode()
            self.assertFalse(re.search("tail|filter\\b|token", sent), sent)

    def test_a_key_file_of_any_name(self):
        path = os.path.join(self.home, "ssh-key.pub")
        vastai.write_private(path, "ssh-ed25519 AAAA me")
        server = self.serve(reply({"success": True}))
        self.assertEqual(self.run_here(server, "attach", "ssh", "5", path)[0], 0)
        self.assertEqual(json.loads(server.requests[0]["body"]), {"ssh_key": "ssh-ed25519 AAAA me"})

    def test_path_parts(self):
        client = self.client(self.serve(reply({"id": 1})))
        for name in ("a" * 300, "\U0001f600" * 90):
            self.assertEqual(client.show_team_role(name), {"id": 1})
        self.assertIsInstance(self.error(client.show_team_role, "a" * 301), vastai.UsageError)

    def test_an_argument_given_twice(self):
        with self.assertRaises(TypeError):
            self.client("http://unused").show_instance(5, id=5)

    def test_two_rows_of_one_name(self):
        row = vastai.Command("show user", "GET /x/", vastai.SAFE, vastai.READS, "another", face="sdk")
        self.assertRaises(ValueError, vastai.register, "Odd", row)

    def test_curl_has_the_key_where_the_key_is(self):
        status, out, _ = self.run_here(self.serve(reply()), "label", "instance", "1", "@KEY@", "--curl")
        self.assertEqual((status, "@KEY@" in out, out.count("$VAST_API_KEY")), (0, True, 1))
        status, out, _ = self.run_here(self.serve(reply()), "get", "wrkgrp-logs", "1", "--curl")
        self.assertEqual((status, out.count("$VAST_API_KEY")), (0, 2))


class TestQuiet(FaultCase):
    """Methods print nothing, not even at a terminal; a line of progress is gone before an error is said."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def test_methods(self):
        client = self.client(self.serve(reply({"instances": [{"id": 1}], "offers": []})))
        with contextlib.redirect_stderr(self.Terminal()) as err, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            client.show_instances(status=["odd"])
            client.search_offers("foo=1")
        self.assertEqual((err.getvalue(), len(caught)), ("", 2))

    def test_progress(self):
        server = self.serve(reply({"instances": {"actual_status": "loading", "status_msg": "x" * 99}}))
        out, err = io.StringIO(), self.Terminal()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.dict(os.environ, COLUMNS="40"):
            status = vastai.main(["wait", "instance", "7", "--max-wait", "0.1", "--url", server.url, "--api-key", KEY])
        self.assertEqual(status, 9)
        steps = err.getvalue().split(vastai.CLEAR)
        self.assertTrue(all(len(step) < 40 for step in steps[:-1]), steps)
        self.assertTrue(steps[-1].startswith("wait instance: "), steps)

    def test_terminals_without_a_size(self):
        with contextlib.redirect_stderr(self.Terminal()), mock.patch.dict(os.environ, TERM="dumb"):
            self.assertFalse(vastai.erasable(sys.stderr))
        for columns, width in (("0", 80), ("", 80), ("x", 80), ("5", 20), ("132", 132)):
            with mock.patch.dict(os.environ, COLUMNS=columns):
                self.assertEqual(vastai.terminal_width(), width)


class TestRequestsLibrary(FaultCase):
    """Where the program has imported `requests`, our exceptions are its exceptions too."""

    SCRIPT = """
import sys, types
sys.path.insert(0, {here!r})
import {library}, vastai, pickle
requests = {library}
client = vastai.VastAI("k" * 20, {url!r}, retry=1, timeout=0.6)
for number, expected in enumerate([requests.HTTPError, requests.ConnectionError, requests.Timeout] * 2):
    try:
        client.create_team("t") if number > 2 else client.show_user()
    except expected as error:
        assert isinstance(error, vastai.VastAIError), type(error)
        assert isinstance(error, requests.RequestException), type(error)
        if expected is requests.HTTPError:
            assert error.response is not None and error.response.status_code == error.status, error.response
        again = pickle.loads(pickle.dumps(error))
        assert str(again) == str(error)
        print(type(error).__name__)
try:
    client.request("e", "/x", {{}})
except requests.HTTPError as error:
    print(isinstance(error, vastai.VastAIError) and error.response.status_code)
try:
    client.show_instance("x")
except requests.RequestException:
    raise AssertionError
except ValueError:
    print("ValueError")
assert "requests" == {library!r} or "requests" not in sys.modules
"""
    FAKE = """
class RequestException(IOError):
    def __init__(self, *args, **given):
        self.response, self.request = given.pop("response", None), given.pop("request", None)
        super().__init__(*args, **given)
class HTTPError(RequestException): pass
class ConnectionError(RequestException): pass
class Timeout(RequestException): pass
"""

    def run_script(self, path="", library="requests"):
        server = self.serve(reply({"msg": "no"}, 500, Connection="close"), hang_up, stall, reply("", 502), hang_up,
                            stall, reply({"msg": "no"}, 400))
        done = subprocess.run([sys.executable, "-c", self.SCRIPT.format(here=HERE, url=server.url, library=library)],
                              capture_output=True, env={**os.environ, "PYTHONPATH": path}, timeout=20)
        self.assertEqual(done.stderr.decode(), "")
        self.assertEqual(done.stdout.decode().split(), ["VastAIError", "NetworkError",
                                                        "NetworkError"] + ["OutcomeUnknownError"] * 3 + ["400", "ValueError"])

    def test_stand_in(self):
        with open(os.path.join(self.home, "requests.py"), "w", encoding="utf-8") as file:
            file.write(self.FAKE)
        self.run_script(self.home)

    def test_real(self):
        probe = "import requests; print(requests.__file__)"
        done = subprocess.run([sys.executable, "-c", probe], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if done.returncode:
            self.skipTest("requests is not installed here")
        self.run_script(os.path.dirname(os.path.dirname(done.stdout.decode().strip())))

    def test_something_else_of_that_name(self):
        for other in (mock.Mock(spec=[]), mock.Mock(HTTPError=7, ConnectionError="x", Timeout=None), None):
            with mock.patch.dict(sys.modules, requests=other):
                self.assertIs(type(self.error(self.client(self.serve(hang_up), retry=1).show_user)),
                              vastai.NetworkError)
                self.assertIs(type(self.error(self.client(self.serve(reply("", 400))).show_user)), vastai.VastAIError)


class TestUnknownRental(FaultCase):
    """After a rental without an answer there is one look at the instances of its label."""

    def rent(self, rows, call="create_instance", fault=hang_up, **given):
        """The error of a rental, and the requests that were made; `rows` gives the instances for a label."""
        def route(request):
            if request["method"] == "GET":
                query = urllib.parse.parse_qs(urllib.parse.urlsplit(request["target"]).query)
                filters = json.loads(query["select_filters"][0])
                found = rows(filters["label"]["in"][0])
                return found if isinstance(found, bytes) else reply({"instances": found, "success": True})
            return fault
        server = self.serve(route=route)
        args = (6995713, "image") if call == "create_instance" else ("RTX_4090", "1", "image")
        error = self.error(getattr(self.client(server), call), *args, **given)
        self.assertEqual(len(server.writes), 1)
        return error, server.requests

    def test_found(self):
        for call in ("create_instance", "launch_instance"):
            error, requests = self.rent(lambda label: [{"id": 4242, "label": label, "start_date": time.time()}], call,
                                        label="train")
            self.assertEqual((error.found, [request["method"] for request in requests]), (4242, ["PUT", "GET"]))
            self.assertRegex(str(error), r"4242.*'train'.* maybe yours")
            error, _ = self.rent(lambda label: [{"id": 4242, "label": label, "start_date": None}], call,
                                 fault=reply("", 504), label="train")
            self.assertEqual((error.found, error.status), (4242, 504))
            self.assertIs(type(error), vastai.OutcomeUnknownError)
        for fault in (reply("", 500), reply("[]"), reply("<html>"), reply("null")):  # nor does that deny it
            error, _ = self.rent(lambda label: [{"id": 4242, "label": label}], fault=fault, confirm=True)
            self.assertEqual(error.found, 4242)
            self.assertIn("`vastai show instances` before you try again", str(error))

    def test_not_found(self):
        old = {"id": 1, "label": "train", "start_date": time.time() - 86400}
        for rows in ([], [old], [{"id": 2, "label": "other"}]):
            error, _ = self.rent(lambda label, rows=rows: rows, label="train")
            self.assertIsNone(error.found)
            self.assertRegex(str(error), "labeled 'train': none has appeared")
            self.assertIn("vastai show instances", str(error))

    def test_ambiguous(self):
        error, _ = self.rent(lambda label: [{"id": n, "label": label} for n in (3, 4)], label="train")
        self.assertIsNone(error.found)
        self.assertRegex(str(error), "several have appeared: 3, 4")

    def test_could_not_look(self):
        for rows in (reply("", 500), reply("<html>"), reply({"instances": None}), reply({"instances": [3]})):
            error, _ = self.rent(lambda label, rows=rows: rows, label="train")
            self.assertIsNone(error.found)
            self.assertIn("could not be listed", str(error))

    def test_without_an_id(self):
        """A row of ours that names no id is no instance that could be destroyed, and none that was."""
        error, _ = self.rent(lambda label: [{"id": None, "label": label}], label="train")
        self.assertIsNone(error.found)
        self.assertNotIn("None", str(error))
        offers = reply({"offers": [{"id": 1, "machine_id": 3, "dph_total": 0.1}]})

        def route(request):
            label = [json.loads(sent["body"])["label"] for sent in server.requests if "/asks/" in sent["target"]]
            if request["method"] == "GET" and "select_filters" in request["target"]:
                return reply({"instances": [{"id": None, "label": label[0]}]})
            return {"POST": offers, "PUT": hang_up}.get(request["method"], reply({"id": 1, "credit": 5}))
        server = self.serve(route=route)
        error = self.error(self.client(server).launch_instance, image="a/b", query="num_gpus=1", max_price=1)
        self.assertEqual((type(error), error.found, "without an id" in str(error)), (vastai.OutcomeUnknownError, None, True))
        self.assertNotIn("destroyed", str(error))

    def test_confirm(self):
        labels = []
        for _ in range(2):
            error, requests = self.rent(lambda label: labels.append(label) or [{"id": 5, "label": label}], confirm=True)
            self.assertEqual((error.found, json.loads(requests[0]["body"])["label"]), (5, labels[-1]))
        self.assertRegex(labels[0], "^vastai-[0-9a-f]{8,}$")
        self.assertNotEqual(*labels)
        error, requests = self.rent(lambda label: [], confirm=True, label="mine")
        self.assertEqual(json.loads(requests[0]["body"])["label"], "mine")

    def test_without_a_label(self):
        error, requests = self.rent(lambda label: self.fail("looked"))
        self.assertEqual((error.found, len(requests)), (None, 1))

    def test_command_line(self):
        def route(request):
            return reply({"instances": [{"id": 4242, "label": "train"}]}) if request["method"] == "GET" else hang_up
        status, out, err = self.run_here(self.serve(route=route), "create", "instance", "7", "--image", "i", "--label",
                                    "train")
        self.assertEqual((status, out), (7, ""))
        self.assertIn("4242", err)

    def test_answered(self):
        server = self.serve(reply(RENTED))
        self.assertEqual(self.client(server).create_instance(7, "image", label="train", confirm=True), RENTED)
        self.assertEqual(len(server.requests), 1)


class TestManyItems(FaultCase):
    IDS = list(range(1, 201))  # 64 + 64 + 64 + 8

    def results(self, call, steps, **given):
        server = self.serve(*steps)
        error = self.error(getattr(self.client(server), call), self.IDS, **given)
        return error, server

    def test_an_id_that_is_given_twice(self):
        for call, more in (("destroy_instances", {}), ("create_instances", {"image": "a/b"})):
            server = self.serve(reply({"success": True, "new_contracts": [501, 502]}))
            getattr(self.client(server), call)("8, 7 8", **more)
            self.assertIn([8, 7], json.loads(server.requests[0]["body"]).values())

    def test_some_fail(self):
        for call in ("start_instances", "stop_instances", "destroy_instances"):
            error, server = self.results(call, [reply({"success": True}), reply({"msg": "no"}, 500),
                                                reply({"success": True})])
            self.assertEqual((type(error), error.exit_status, len(server.requests)), (vastai.PartialError, 8, 4))
            self.assertEqual([item["id"] for item in error.results], self.IDS)
            self.assertEqual([item["id"] for item in error.results if not item["success"]], list(range(65, 129)))
            self.assertRegex(str(error), "64 of 200 failed: 65, 66")

    def test_rentals_are_not_multiplied(self):
        for fault in (hang_up, reset, reply("", 503)):
            error, server = self.results("create_instances", [reply(RENTED), fault, reply(RENTED)], image="i")
            self.assertEqual((type(error), len(server.requests)), (vastai.PartialError, 4))
            self.assertEqual(len(server.writes), len(set(server.writes)))
            self.assertIn("unknown", json.dumps(error.results))

    def test_rentals_that_no_answer_tells_of(self):
        """An answer that cannot be read, and one that names fewer instances than offers, leave the outcome open."""
        made = reply({"success": True, "new_contracts": list(range(1, 65))})
        for fault in (reply("<html>"), reply("null"), reply(b"no gzip", Content_Encoding="gzip"), reply(RENTED)):
            error, _ = self.results("create_instances", [made, fault, made], image="i")
            states = [item["success"] for item in error.results]
            self.assertEqual((type(error), states), (vastai.PartialError, [True] * 64 + [None] * 64 + [True] * 64 + [True] * 8))
            self.assertIn("vastai show instances", str(error))
        client = self.client(self.serve(reply({"success": True, "new_contracts": [501]})))
        error = self.error(client.create_instances, [7, 8], image="i")
        self.assertEqual((type(error), error.found), (vastai.OutcomeUnknownError, [501]))
        self.assertRegex(str(error), "7, 8.*named 1 of 2 instances.*created: instances 501")

    def test_all_fail(self):
        error, server = self.results("create_instances", [hang_up], image="i")
        self.assertIs(type(error), vastai.OutcomeUnknownError)
        self.assertEqual(len(server.writes), len(set(server.writes)))
        error, server = self.results("stop_instances", [reply({"msg": "who?"}, 401)])
        self.assertEqual((type(error), len(server.requests)), (vastai.AuthError, 1))

    def test_key_revoked_meanwhile(self):
        error, _ = self.results("stop_instances", [reply({"success": True}), reply({"msg": "who?"}, 401)])
        self.assertEqual((type(error), sum(item["success"] for item in error.results)), (vastai.PartialError, 64))

    def test_machines(self):
        server = self.serve(reply({"success": True}), reply({"msg": "no"}, 404), reply({"success": True}))
        error = self.error(self.client(server).list_machines, [1, 2, 3], price_gpu=0.5)
        self.assertIs(type(error), vastai.PartialError)
        self.assertEqual(len([item for item in error.results if not item.get("success")]), 1)

    def test_reported(self):
        status, out, err = self.run_here(self.serve(reply({"success": True}), reply("", 500)), "stop", "instances",
                                    *map(str, self.IDS[:70]))
        self.assertEqual((status, len(json.loads(out))), (8, 70))
        self.assertIn("6 of 70 failed", err)


# ------------------------------------------------------------------------ faults: threads and forks


class TestConcurrency(FaultCase):
    def test_closed_while_used_with_tls(self):
        """The key never leaves in plain text, and no call fails, whoever closes the connections."""
        server, errors = self.serve(reply(USER), tls=server_context(self.home)), []
        with mock.patch.dict(os.environ, SSL_CERT_FILE=os.path.join(self.home, "ca.pem")):
            client = self.client(server)

            def work():
                try:
                    for _ in range(15):
                        client.show_user()
                except Exception as error:
                    errors.append(error)
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                client.close()
                time.sleep(0.001)
        self.assertEqual((errors, len(server.requests)), ([], 60))

    @unittest.skipUnless(hasattr(signal, "SIGALRM"), "no signals of POSIX")
    def test_in_a_signal_handler_and_at_the_end(self):
        """A handler may interrupt its own thread wherever that is; a program that ends starts no more threads."""
        script = """
import atexit, os, signal, sys
sys.path.insert(0, %r)
import vastai
client = vastai.VastAI("k" * 20, %r)
signal.signal(signal.SIGALRM, lambda *_: print(client.show_user()["id"]))
os.kill(os.getpid(), signal.SIGALRM)
atexit.register(lambda: print(len(client.list_machines([1, 2, 3]))))
"""
        server = self.serve(reply({**USER, "success": True}))
        done = subprocess.run([sys.executable, "-S", "-c", script % (HERE, server.url)], capture_output=True, timeout=20)
        self.assertEqual((done.stdout.split(), done.stderr), ([b"7", b"3"], b""))

    def test_deep_in_calls_of_the_program(self):
        """That the caller's stack is full is not the service's fault, nor that of an argument."""
        client, ended = self.client(self.serve(reply(RENTED))), []

        def down(levels):
            return down(levels - 1) if levels else client.create_instance(8, "a/b")
        down(0)
        for levels in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit(), 3):
            try:
                ended.append(down(levels)["success"])
            except RecursionError:
                ended.append(False)
        self.assertEqual(set(ended), {True, False})
        tuples = functools.reduce(lambda inner, _: (inner,), range(50_000), ())
        for deep in (NESTED, tuples):  # that of an argument is, wherever it stands
            for call in (lambda deep=deep: client.search_offers(order=[{"a": deep}]),
                         lambda deep=deep: client.create_instance(8, "a/b", env={"A": deep})):
                self.assertRaises(vastai.UsageError, call)

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_fork_during_the_first_call(self):
        """Modules are never half loaded in the child, however long they take."""
        script = """
import importlib.abc, os, sys, threading, time
sys.path.insert(0, %r)
import vastai
class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in ("json", "urllib.parse", "socket"):
            begun.set()
            time.sleep(0.1)
def call():
    return vastai.VastAI("k" * 20, %r).show_user()["id"]
begun = threading.Event()
sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=call)
thread.start()
begun.wait()
child = os.fork()
if not child:
    import signal
    signal.alarm(5)
    os._exit(call() != 7)
thread.join()
assert os.waitpid(child, 0)[1] == 0
"""
        server = self.serve(reply(USER))
        done = subprocess.run([sys.executable, "-W", "ignore", "-S", "-c", script % (HERE, server.url)], capture_output=True, timeout=20)
        self.assertEqual((done.returncode, done.stderr), (0, b""))

    def echo(self, request):
        """The number that a request names, by way of a fault at times."""
        number = int(request["path"].split("/")[4])
        count = self.seen[number] = self.seen.get(number, 0) + 1
        faults = [hang_up, reset, reply("", 503), reply("", 429, Retry_After="0"), cut(reply(LONG)[:-9]),
                  reply({"msg": f"no {number}"}, 400)]
        if number % 4 == 0 and count == 1:
            return faults[number // 4 % len(faults)]
        return reply({"instances": {"id": number}}, **({"Connection": "close"} if number % 7 == 0 else {}))

    def test_threads(self):
        self.seen = {}
        server = self.serve(route=self.echo)
        client, wrong = self.client(server), []
        before = (threading.active_count(), open_files())

        def work(thread):
            for number in range(thread * 20, thread * 20 + 20):
                try:
                    if client.show_instance(number)["id"] != number:
                        wrong.append(number)
                except vastai.VastAIError as error:
                    if error.msg != f"no {number}" or number % 24 != 20:
                        wrong.append(error)
        threads = [threading.Thread(target=work, args=(n,)) for n in range(64)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(wrong, [])
        self.assertEqual(len(self.seen), 64 * 20)
        client.close()
        server.hang_up()
        for _ in range(200):
            if threading.active_count() <= before[0] and (open_files() or 0) <= (before[1] or 0):
                break
            time.sleep(0.01)
        self.assertLessEqual(threading.active_count(), before[0])
        if before[1] is not None:
            self.assertLessEqual(open_files(), before[1])

    def test_closed_while_used(self):
        server = self.serve(reply(USER))
        client, errors = self.client(server), []

        def work():
            try:
                for _ in range(30):
                    client.show_user()
            except Exception as error:
                errors.append(error)
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            client.close()
            time.sleep(0.001)
        self.assertEqual(errors, [])

    def test_no_leak_after_faults(self):
        server = self.serve(*LOST.values(), *UNREADABLE.values(), hang_up)
        client = self.client(server, retry=1)
        client.close()
        before = open_files()
        if before is None:
            self.skipTest("nothing tells how many files are open here")
        for _ in range(len(LOST) + len(UNREADABLE)):
            self.error(client.show_user)
        client.close()
        server.__exit__()
        for _ in range(200):
            if open_files() <= before:
                break
            time.sleep(0.01)
        self.assertLessEqual(open_files(), before)

    def test_with(self):
        server = self.serve(reply(USER))
        with vastai.VastAI(KEY, server.url) as client:
            self.assertIsInstance(client, vastai.VastAI)
            client.show_user()
            self.assertEqual([len(waiting) for waiting in client.pool.idle.values()], [1])
        self.assertEqual(client.pool.idle, {})

    def test_pickled_client(self):
        client = self.client(self.serve(reply(USER)), retry=7)
        client.show_user()
        again = pickle.loads(pickle.dumps(client))
        self.assertEqual((again.retry, again.show_user()["id"]), (7, 7))
        again.close()
        self.assertNotIn(KEY, repr(client) + str(client))

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_fork(self):
        """Parent and child use the client after a fork; neither gets the other's answers."""
        script = """
import os, sys
sys.path.insert(0, %r)
import vastai
client = vastai.VastAI("k" * 20, %r)
client.show_instance(1)
child = os.fork()
base = 1000 if child else 2000
good = all(client.show_instance(number)["id"] == number for number in range(base, base + 100))
if not child:
    os._exit(not good)
assert good and os.waitpid(child, 0)[1] == 0
assert client.show_instance(5)["id"] == 5
print("good")
"""
        server = self.serve(route=lambda request: reply({"instances": {"id": int(request["path"].split("/")[4])}}))
        done = subprocess.run([sys.executable, "-c", script % (HERE, server.url)], capture_output=True, timeout=20)
        self.assertEqual((done.stdout.split(), done.stderr), ([b"good"], b""))
        self.assertEqual(server.connections, 2)

    def test_spawn(self):
        script = """
import multiprocessing, sys
sys.path.insert(0, %r)
import vastai
if __name__ == "__main__":
    client = vastai.VastAI("k" * 20, %r)
    client.show_instance(1)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print([row["id"] for row in pool.map(client.show_instance, [5, 6, 7])])
        try:
            pool.apply(client.show_instance, ("x",))
        except vastai.UsageError as error:
            print(error.exit_status)
"""
        path = os.path.join(self.home, "spawns.py")
        server = self.serve(route=lambda request: reply({"instances": {"id": int(request["path"].split("/")[4])}}))
        with open(path, "w", encoding="utf-8") as file:
            file.write(script % (HERE, server.url))
        done = subprocess.run([sys.executable, path], capture_output=True, timeout=20)
        self.assertEqual((done.stdout.decode().splitlines(), done.stderr), (["[5, 6, 7]", "2"], b""))


def open_files():
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return None


# ----------------------------------------------------------------- faults: secrets and hostile text


class TestSecrets(FaultCase):
    def test_a_key_in_a_cell(self):
        row = {"id": 7, "status_msg": f"login with {KEY} failed", "label": KEY}
        for words in (["show", "instance", "7"], ["show", "instances"]):
            out = self.run_here(self.serve(reply({"instances": row if len(words) > 2 else [row]})), *words).stdout
            self.assertIn("***", out)

    def test_a_line_that_is_not_understood_is_told_without_values(self):
        server = self.serve(reply({"msg": "refused Hush-4711"}, 400))
        for words in (["show", "user", "--api-key Hush-4711"], ["show", "user", "--api_keyHush-4711"],
                      ["show", "user", "--apikey:Hush-4711"], ["show", "user", "VAST_API_KEY=Hush-4711"],
                      ["VAST_API_KEY=Hush-4711", "show", "user"], ["show user --api-key Hush-4711"],
                      ["show", "user", "--format=--api-kye=Hush-4711"], ["stop", "instance", "--api-key Hush-4711"],
                      ["stop", "instances", "5", "--api-key Hush-4711"], ["show", "user", "--format", "--api-key Hush-4711"],
                      ["show", "user", "--profile=--api-key Hush-4711"],
                      ["create", "instance", "8", "--image", "i", "--env", "TOKEN:Hush-4711"],
                      ["create", "instance", "8", "--image", "i", "--login", "-u me -p Hush-4711 docker.io"],
                      ["create", "template", "--name", "n", "--image", "i", "--env", "-e A=Hush-4711 -p 80:80"]):
            status, out, err = self.run_here(server, *words)
            self.assertEqual((status != 0, "Hush" in out + err), (True, False), err)

    def test_places_where_a_secret_is_echoed(self):
        """Headers, addresses, names of members, and sentences of success."""
        step = reply({"msg": "no", KEY: 1, "a": {f"x{KEY}": [KEY]}}, 400, X_Echo=KEY, Retry_After="1")
        error = self.error(self.client(self.serve(step)).show_user)
        told = repr(error.response.headers) + error.response.text + repr(error.body) + error.response.url
        self.assertNotIn(KEY, told)
        self.assertIn("***", error.response.headers["X-Echo"])
        again = pickle.loads(pickle.dumps(error))
        self.assertEqual((again.status, again.response.headers["x-echo"]), (400, "***"))
        status, out, err = self.run_here(self.serve(reply({"success": True, "msg": "A is now s3cr3t-env-value"})),
                                         "create", "env-var", "A", "s3cr3t-env-value")
        self.assertEqual((status, "s3cr3t" in out + err), (0, False))

        step = reply({"msg": "refused s3cr3t-inner s3cr3t-outer"}, 400)
        error = self.error(self.client(self.serve(step)).set_user, params={"a": {"b": ["s3cr3t-inner"]}, "c": "s3cr3t-outer"})
        self.assertIn("refused *** ***", str(error))
        server = self.serve(reply({**RENTED, "msg": f"{KEY} s3cr3t-env-value s3cr3t-login"}))
        out = self.run_here(server, "create", "instance", "7", "--image", "i", *(
            word for name, value in self.SECRETS.items() for word in (f"--{name}", value))).stdout
        self.assertRegex(out, r"^Started\. .*'msg': '\*\*\* \*\*\* \*\*\*'")

    def test_a_status_message_with_a_secret(self):
        """What the service says of an instance whose start fails is shown without what was sent to it."""
        row = {"id": 77, "actual_status": "loading", "intended_status": "running", "cur_state": "running", "next_state": "running",
               "status_msg": "Error response from daemon: bad TOKEN=s3cr3t-env-value"}
        server = self.serve(route=lambda request: reply(RENTED if request["method"] == "PUT" else {"instances": row}))
        words = ("create", "instance", "7", "--image", "i", "--env", "-e TOKEN=s3cr3t-env-value", "--wait", "--max-wait", "1")
        status, out, err = self.run_here(server, *words)
        self.assertNotEqual(status, 0)
        self.assertNotIn("s3cr3t", out + err)
        self.assertIn("bad TOKEN=***", err)

    def test_ports_are_no_secret(self):
        status, out, _ = self.run_here("http://127.0.0.1:9", "create", "instance", "7", "--image", "i", "--env", "-e A=s3cr3t-value -p 8080:80", "--curl")
        self.assertEqual(status, 0)
        self.assertNotIn("s3cr3t", out)
        body = json.loads(shlex.split(out)[-1])
        self.assertEqual(body["env"], {"A": "***", "-p 8080:80": "1"})

    def test_a_server_with_a_password(self):
        for url in ("http://me:sesame@h", "https://me:sesame@[::1", "me:sesame@h", "http://h/?key=sesame", "http://h/#sesame"):
            status, out, err = self.run_here(None, "show", "user", "--url", url)
            self.assertEqual((status, out, "sesame" in err), (2, "", False))
            with mock.patch.dict(os.environ, VAST_URL=url), self.assertRaises(vastai.UsageError) as caught:
                vastai.VastAI()
            self.assertNotIn("sesame", str(caught.exception))

    def test_server_addresses(self):
        for url in ("http://h:8080/api/v0", "http://h:8080/api/v0/", "http://h:8080/", "http://h:8080/api/v1"):
            with mock.patch.dict(os.environ, VAST_URL=url):
                self.assertEqual(vastai.VastAI().server_url, "http://h:8080")
        self.assertEqual(vastai.VastAI(server_url="http://[::1]:80/sub/api/v0").server_url, "http://[::1]:80/sub")

    def key_file(self, data):
        path = vastai.own_file("config", "vast_api_key")
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)
        return path

    def refusal(self, *words, status=3):
        """The error of a command line without --api-key; None is sent."""
        server = self.serve(reply(USER))
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            found = vastai.main(["--url", server.url, *(words or ("show", "user"))])
        self.assertEqual((found, out.getvalue(), server.requests), (status, "", []), err.getvalue())
        return err.getvalue()

    def test_forms_of_a_key_file(self):
        for data in (b"\xef\xbb\xbf" + KEY.encode(), (KEY + "\r\n").encode("utf-16"), KEY.encode("utf-16-le"), KEY.encode() + b"\r\n", f"\n {KEY}\n\n".encode()):
            self.key_file(data)
            self.assertEqual((vastai.VastAI().api_key, vastai.VastAI().creds_source), (KEY, "FILE"))
        self.assertIn(f"{self.key_file(b' ')} (is empty)", self.refusal())
        path = self.key_file(b"\xff\xfe\xff")
        self.assertIn(f"the API key file {path} is not a text file", self.refusal())
        os.replace(path, path + ".work")
        err = self.refusal("show", "user", "--profile", "work")
        self.assertIn(f"the API key file {path}.work is not a text file", err)
        os.replace(path + ".work", path)
        os.unlink(path)
        os.mkdir(path)
        self.assertIn(f"the API key file {path} cannot be read: Is a directory", self.refusal())
        os.rmdir(path)
        if hasattr(os, "mkfifo"):
            os.mkfifo(path)
            status, _, err = self.run_process("show", "user", env={"VAST_API_KEY": None})
            self.assertEqual((status, "cannot be read: it is not a regular file" in err), (3, True), err)
            status, _, err = self.save_key()
            self.assertEqual((status, "is not a regular file" in err, stat.S_ISFIFO(os.stat(path).st_mode)), (2, True, True), err)
            os.unlink(path)
        for data, words in ((KEY.encode() * 500, "too long"), (b"'%b'" % KEY.encode(), "in quotes"), (b"$VAST_API_KEY", "variable"), (b"two\nlines", "line break")):
            self.key_file(data)
            err = self.refusal(status=2)
            self.assertIn(words, err)
            self.assertIn(path, err)
            self.assertNotIn(KEY, err)

    def test_forms_of_a_key_on_stdin(self):
        for data in (b"\xef\xbb\xbf%b\r\n" % KEY.encode(), f"{KEY}\r\nmore".encode("utf-16"), f"\ufeff{KEY}\n".encode("utf-16-be")):
            with self.subTest(data), tempfile.TemporaryFile() as file:
                file.write(data)
                file.seek(0)
                status, _, err = self.run_process("set", "api-key", "-", stdin=file)
                self.assertEqual((status, vastai.VastAI().api_key), (0, KEY), err)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid(), "root reads everything")
    def test_a_key_file_that_cannot_be_read(self):
        os.chmod(self.key_file(KEY.encode()), 0)
        self.assertIn("cannot be read: Permission denied", self.refusal())

    def test_a_variable_of_another_name(self):
        self.assertNotIn("VASTAI_API_KEY", self.refusal())
        with mock.patch.dict(os.environ, VASTAI_API_KEY=KEY):
            self.assertIn("VASTAI_API_KEY is set", self.refusal())

    def save_key(self, **variables):
        with mock.patch.dict(os.environ, variables):
            return self.run_here(None, "set", "api-key", "new-key-1234567890")

    @unittest.skipUnless(os.name == "posix", "links and modes")
    def test_files_and_folders_of_the_key(self):
        store = os.path.join(self.home, "dotfiles", "key")
        os.mkdir(os.path.dirname(store))
        path = self.key_file(b"old")
        os.replace(path, store)
        os.symlink(os.path.join("..", "..", "dotfiles", "key"), path)
        self.assertEqual(self.save_key()[0], 0)
        self.assertTrue(os.path.islink(path))
        with open(store, encoding="ascii") as file:
            self.assertEqual(file.read(), "new-key-1234567890")
        for mask in (0, 0o777):
            folder = os.path.join(self.home, f"new{mask}", "deep")
            old_mask = os.umask(mask)
            try:
                self.assertEqual(self.save_key(XDG_CONFIG_HOME=folder)[0], 0)
            finally:
                os.umask(old_mask)
            self.assertEqual([stat.S_IMODE(os.stat(place).st_mode) for place in (os.path.dirname(folder), folder, os.path.join(folder, "vastai"))],
                             [0o700] * 3)
            saved = os.path.join(folder, "vastai", "vast_api_key")
            self.assertEqual(stat.S_IMODE(os.stat(saved).st_mode), 0o600)
        os.mkdir(os.path.join(self.home, ".vast_api_key"))  # is no key file, and in nobody's way
        self.assertEqual(self.save_key()[0], 0)

    def test_folders_that_cannot_be(self):
        """A relative folder, or ~ without a home, is never written to; reading skips it."""
        work = os.path.join(self.home, "work")
        os.mkdir(work)
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        os.chdir(work)
        status, _, err = self.save_key(XDG_CONFIG_HOME="rel/dir")
        self.assertEqual((status, os.listdir(".")), (2, []), err)
        self.assertIn("XDG_CONFIG_HOME is 'rel/dir'", err)
        with mock.patch.dict(os.environ, XDG_CONFIG_HOME="rel"):
            os.makedirs(os.path.join("rel", "vastai"))
            with open(os.path.join("rel", "vastai", "vast_api_key"), "w", encoding="ascii") as file:
                file.write(KEY)
            self.assertIn("'rel', not an absolute path", self.refusal())
        shutil.rmtree("rel")
        with mock.patch("os.path.expanduser", lambda path: path):
            status, _, err = self.save_key(XDG_CACHE_HOME="")
            self.assertEqual((status, os.listdir(".")), (2, []), err)
            self.assertIn("no home folder", err)
            self.assertIn("no home folder", self.refusal())

    SECRETS = {"env": "-e TOKEN=s3cr3t-env-value -p 80:80", "login": "-u me -p s3cr3t-login registry.example"}

    def test_echoed(self):
        """What the service says is shown without the key, in every exception and on the command line."""
        echo = {"success": False, "error": "x", "msg": f"bad key {KEY} s3cr3t-env-value"}
        for step in (reply(echo, 400), reply(echo, 401), reply(echo, 429, Retry_After="99"), reply(echo, 503),
                     reply(echo),
                     reply(f"you are {KEY}, s3cr3t-env-value"), reply([f"{KEY} s3cr3t-env-value"]),
                     reply({"msg": KEY}, 302)):
            server = self.serve(step)
            client = self.client(server)
            for call in (client.show_ssh_keys, client.show_instances, functools.partial(client.logs, 7),
                         functools.partial(client.create_env_var, "name", "s3cr3t-env-value"),
                         functools.partial(client.create_instance, 7, "image", **self.SECRETS)):
                with contextlib.suppress(AttributeError, KeyError):
                    try:
                        call()
                    except vastai.VastAIError as error:
                        told = "".join(traceback.format_exception(type(error), error,
                                                                  error.__traceback__)) + repr(error) + repr(error.body)
                        told += error.response.text if error.response else ""
                        self.assertNotIn(KEY, told)
                        if error.command in ("create env-var", "create instance"):
                            self.assertNotIn("s3cr3t", told)
            for words in (["label", "instance", "7", "x"], ["create", "env-var", "a", "s3cr3t-env-value"]):
                for more in ([], ["--raw"]):
                    told = "".join(self.run_here(server, *words, *more)[1:])
                    self.assertTrue("env-var" not in words or "s3cr3t" not in told)

    def test_explain_and_curl(self):
        server = self.serve(reply({"success": True}))
        for row in vastai.COMMANDS.values():
            if not row.path or row.run or row.face == "cli":
                continue
            given = {**believable(row, "sdk", self.home)}
            secret = [arg for arg in row.args if arg.secret and arg.face != "cli" and arg.kind.annotation == "str"]
            given.update({arg.name: f"-u me -p s3cr3t{n} registry" if arg.name == "login" else f"s3cr3t{n}" for n,
                          arg in enumerate(secret)})
            out, err = io.StringIO(), io.StringIO()
            with self.subTest(command=row.name), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                with contextlib.suppress(vastai.VastAIError):
                    getattr(self.client(server, explain=True), row.methods[0])(**given)
                with contextlib.suppress(vastai.VastAIError):
                    self.assertIsNone(getattr(self.client(server, curl=True), row.methods[0])(**given))
                self.assertNotIn("s3cr3t", out.getvalue() + err.getvalue())
                self.assertNotIn(KEY, out.getvalue() + err.getvalue())

    def test_explain_of_a_rental(self):
        server = self.serve(reply(RENTED))
        status, out, err = self.run_here(server, "create", "instance", "7", "--image", "i", "--env", self.SECRETS["env"],
                                    "--login", self.SECRETS["login"], "--explain")
        self.assertEqual(status, 0)
        self.assertNotIn("s3cr3t", out + err)
        self.assertIn("TOKEN", err)
        self.assertIn("s3cr3t-env-value", server.requests[0]["body"].decode())

    def test_bad_values_are_not_repeated(self):
        for row in vastai.COMMANDS.values():
            for arg in row.args:
                if arg.secret and arg.face != "cli" and row.face != "cli":
                    given = {**believable(row, "sdk", self.home), arg.name: ["s3cr3t", object()]}
                    with self.assertRaises((vastai.UsageError, TypeError)) as caught:
                        getattr(self.client("http://127.0.0.1:9"), row.methods[0])(**given)
                    self.assertNotIn("s3cr3t", str(caught.exception))

    def test_keys_that_cannot_be(self):
        server = self.serve(reply(USER))
        for key in ("two words", "tail\n", "\thead", "line\r\nX-Injected: 1", "schl\u00fcssel", "zero\u200bwidth",
                    "nul\0", "\x7f"):
            for name in ("show_user", "search_offers"):
                with self.assertRaises(vastai.UsageError) as caught:
                    getattr(vastai.VastAI(key, server.url), name)()
                self.assertNotIn(key, str(caught.exception))
                self.assertIn("api_key=", str(caught.exception))
            with mock.patch.dict(os.environ, VAST_API_KEY=key.replace("\0", " ")), self.assertRaises(vastai.UsageError):
                vastai.VastAI(server_url=server.url).show_user()
        for key in (7, b"bytes", ["list"]):
            with self.assertRaises((vastai.UsageError, TypeError)):
                vastai.VastAI(key, server.url).show_user()
        for key in ("", " ", "\n"):
            with self.assertRaises(vastai.AuthError):
                vastai.VastAI(key, server.url).show_user()
        self.assertEqual(server.requests, [])

    def test_key_file(self):
        folder = os.path.join(self.home, ".config", "vastai")
        old_mask = os.umask(0)
        try:
            os.makedirs(folder, 0o755)
            status, _, err = self.run_here(None, "set", "api-key", "-", stdin=f"  {KEY}\n")
        finally:
            os.umask(old_mask)
        self.assertEqual(status, 0, err)
        path = os.path.join(folder, "vast_api_key")
        with open(path, encoding="ascii") as file:
            self.assertEqual(file.read(), KEY)
        self.assertEqual(os.listdir(folder), ["vast_api_key"])
        if os.name == "posix":
            self.assertEqual([stat.S_IMODE(os.stat(place).st_mode) for place in (folder, path)], [0o700, 0o600])
        self.assertEqual((vastai.VastAI().api_key, vastai.VastAI().creds_source), (KEY, "FILE"))
        for bad in ("", "two words\n", "schl\u00fcssel\n", "\x1b[31m\n"):
            self.assertEqual(self.run_here(None, "set", "api-key", "-", stdin=bad)[0], 2)
        with open(path, encoding="ascii") as file:
            self.assertEqual(file.read(), KEY)

    def test_key_file_that_cannot_be(self):
        with open(os.path.join(self.home, "file"), "w", encoding="ascii"):
            pass
        for config in (os.path.join(self.home, "file"), "/dev/null/x"):
            with mock.patch.dict(os.environ, XDG_CONFIG_HOME=config):
                status, out, err = self.run_here(None, "set", "api-key", "new-key-1234567890")
                self.assertEqual((status, out), (2, ""))
                self.assertIn("cannot write", err)
                self.assertNotIn("new-key", err)

    @unittest.skipUnless(os.name == "posix", "scripts as programs")
    def test_process_list(self):
        """A program that a command starts finds the key neither in its arguments nor in its environment."""
        folder = os.path.join(self.home, "bin")
        os.mkdir(folder)
        for name in ("ssh-keygen", "ssh", "scp", "rsync"):
            with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
                file.write(f'#!/bin/sh\necho "$0" "$@" >> {self.home}/log\nexit 3\n')
            os.chmod(file.name, 0o755)
        row = {"id": 7, "ssh_host": "ssh5.vast.ai", "ssh_port": 22022, "actual_status": "running",
               "image_runtype": "ssh"}
        server = self.serve(route=lambda request: reply({"instances": row if "/7/" in request["path"] else [row],
                                                         "success": True}))
        for words in ("create ssh-key", "ssh 7", "scp 7:/a ."):
            self.run_process("--url", server.url, *words.split(), env={"PATH": folder + os.pathsep + os.environ["PATH"]})
        with open(os.path.join(self.home, "log"), encoding="utf-8") as file:
            text = file.read()
        self.assertNotIn(KEY, text)
        self.assertEqual(len(text.splitlines()), 3)


HOSTILE = {
    "escape": "\x1b[2J\x1b]0;owned\x07\x1b[31mred", "newline": "one\r\ntwo\nthree",
           "bidi": "abc\u202egpj.exe\u2066\u2069", "c1": "\x9b2J\x85",
    "separators": "a\u2028b\u2029c", "backspaces": "good\b\b\b\bevil", "format": "a\u200b\u200d\ufeff\U000e0041b",
           "nul": "a\0b", "tab": "a\tb",
    "half": "a\ud800b", "wide": "\u4e16\u754c" * 5, "combining": "e" + "\u0301" * 500, "long": "x" * 2_000_000,
           "long wide": "\u4e16" * 100_000,
    "long control": "\x1b" * 100_000,
}
UNSAFE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e"
                    "\u2060-\u2069\ufeff\U000e0001-\U000e007f\ud800-\udfff]")


class TestHostileText(FaultCase):
    def check(self, text, lines=None):
        if not text.replace("\n", "").isprintable():  # fast for megabytes
            self.assertIsNone(UNSAFE.search(text), repr(text[:300]))
        if lines:
            self.assertEqual(text.count("\n"), lines, text[:2000])

    def test_tables(self):
        for name, text in HOSTILE.items():
            rows = [{"id": 1, "name": text, "label": text, "actual_status": text[:100], "image": text[:100]},
                    {"id": 2, text[:100]: text[:100]}]
            with self.subTest(text=name):
                server = self.serve(reply({"templates": rows, "instances": rows, "success": True}))
                status, out, err = self.run_here(server, "search", "templates")
                self.assertEqual(status, 0, err)
                self.check(out, 3)
                status, out, err = self.run_here(server, "show", "instances")
                self.assertEqual(status, 0, err)
                self.check(out, 3)
                self.check(err)

    def test_cards_and_sentences(self):
        for name, text in HOSTILE.items():
            with self.subTest(text=name):
                status, out, err = self.run_here(self.serve(reply({"id": 7, "username": text, "email": text,
                                                              "fullname": text})), "show", "user")
                self.assertEqual(status, 0, err)
                self.check(out, 4)
                status, out, err = self.run_here(self.serve(reply({"success": True, "msg": text})), "label", "instance",
                                            "7", "x")
                self.assertEqual(status, 0, err)
                self.check(out, 1)

    def test_errors(self):
        for name, text in HOSTILE.items():
            steps = [reply({"success": False, "error": text, "msg": text}, 400),
                     reply({"success": False, "msg": text}), reply({"detail": text}, 403)]
            if name != "half":
                steps += [reply(text, 400), reply(text)]
            if len(text) < 100:
                target = text.replace("\r", "").replace("\n", "").encode("utf-8", "replace").decode("latin-1")
                steps += [reply("", 302, Location=target)]
            for step in steps:
                with self.subTest(text=name, step=step[:30]):
                    server = self.serve(step)
                    status, out, err = self.run_here(server, "show", "ssh-keys")
                    self.assertEqual((out, status > 0), ("", True))
                    self.check(err)
                    self.assertLess(err.count("\n"), 4)
                    self.assertLess(len(err), 3000)
                    self.check(str(self.error(self.client(server).show_ssh_keys)))

    def test_own_words(self):
        for name, text in HOSTILE.items():
            if len(text) < 1000 and name != "nul":
                for words in ([text], ["show", text], ["show", "instance", text], ["search", "offers", f"{text}=1"],
                              ["label", "instance", "7", "x", f"--{text}"],
                              ["show", "user", f"--{text}"], ["show", "instances", "--cols", text],
                              ["create", "instance", "7", "--onstart", text],
                              ["show", "user", "--url", text]):
                    with self.subTest(text=name, words=words):
                        out, err = io.StringIO(), io.StringIO()
                        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                            vastai.main([*words, "--api-key", KEY, "--url=http://127.0.0.1:9", "--retry", "1"])
                        self.check(err.getvalue())
                        self.check(out.getvalue())

    @unittest.skipUnless(hasattr(os, "openpty"), "no terminals here")
    def test_terminal(self):
        """Through a terminal nothing of the service's moves the cursor, logs included; a pipe gets logs as they are."""
        text = HOSTILE["escape"] + "\r\n" + HOSTILE["bidi"]
        def route(request):
            if "request_logs" in request["path"]:
                return reply({"success": True, "result_url": f"http://{request['headers']['host']}/logs"})
            if request["path"] == "/logs":
                return reply(text)
            return reply({"instances": [{"id": 1, "label": text, "actual_status": text, "status_msg": text}],
                          "success": True, "msg": text, "id": 7, "username": text})
        server = self.serve(route=route)
        for words in ("logs 7", "show instances --verbose", "show user"):
            with self.subTest(words=words):
                shown = self.on_terminal(*words.split(), "--url", server.url)
                shown = re.sub("\x1b\\[(\\d+)?m|\r\x1b\\[K", "", shown).replace("\r\n",
                                                                                "\n")  # our own colors and progress
                self.check(shown)
                self.assertIn("owned", shown)
        self.assertIn("\x1b[2J", self.run_process("logs", "7", "--url", server.url)[1])

    def on_terminal(self, *words, size=(24, 100)):
        """What a command writes to a terminal that is its stdout and stderr."""
        import fcntl
        import termios
        near, far = os.openpty()
        fcntl.ioctl(far, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
        process = self.start_process(*words, env={**environment, "VAST_API_KEY": KEY, "TERM": "xterm",
                                          "PYTHONIOENCODING": "utf-8"}, stdout=far, stderr=far)
        os.close(far)
        parts = []
        with contextlib.suppress(OSError):
            while True:
                part = os.read(near, 65536)
                if not part:
                    break
                parts.append(part)
        os.close(near)
        process.wait(60)
        return b"".join(parts).decode("utf-8", "replace")

    def test_no_slow_expressions(self):
        """Adversarial queries, environments, dates and orders come to an end: none takes the square of its length."""
        size = 100_000
        for text in ("a" * size, "a " * (size // 2), "a" + " " * size, "a" + " " * size + "!", "a" + "=" * size,
                     "a=" + "[" * size, "a=[x " * (size // 5),
                     'a="x ' * (size // 5), "a=" + "[x]" * (size // 3), "a not" + " " * size + "x",
                     "a in " + "[x," * (size // 3), "a>=" * (size // 3),
                     "num_gpus=1 " * (size // 11), '"' * size, "a not in" * (size // 8), " " * size,
                     "a=[" + "x " * (size // 2), "a=1" + " " * size + "b"):
            for parse in (vastai.parse_query, vastai.parse_env, vastai.parse_when,
                          lambda text: vastai.parse_order(text, {}, vastai.OFFER_FIELDS, len),
                          lambda text: vastai.suggest(text, vastai.NAMES)):
                with contextlib.suppress(ValueError, vastai.VastAIError), contextlib.redirect_stderr(io.StringIO()):
                    parse(text)


# -------------------------------------------------------------------------------- faults: wrong use


class Odd:
    """What no argument can be; even its repr is of no help."""

    def __repr__(self):
        raise RuntimeError("no")


NESTED = functools.reduce(lambda inner, _: [inner], range(50_000), [])
NEVER = (Odd(), float("nan"), "\ud800", "\0", "x" * 200_000, {"a": Odd()})  # whatever the kind
BAD = (-float("inf"), b"7", 10 ** 5000, 1j, {"a": float("nan")}, [float("inf")], [Odd()], NESTED, "/", 3.5,
       True)  # where the kind refuses it
BAD_TEXT = ("x" * 200_000, "\udcff", "\0")


class TestBadInput(FaultCase):
    """For every parameter of every row, in both faces: refused with a sentence, nothing sent, nothing written."""

    def setUp(self):
        super().setUp()
        self.server = self.serve(reply({"msg": "should not have been sent"}, 418))
        self.folder = folder_for(self)

    def tearDown(self):
        self.assertEqual(os.listdir(self.home), [])

    def refused(self, text, row):
        sent, self.server.requests = self.server.requests, []
        self.assertEqual(sent, [])
        self.assertNotIn(KEY, text)
        self.assertLess(len(text), 600)
        self.assertNotIn("defect", text)
        self.assertTrue(text.isprintable() or "\n" in text, text)
        self.assertRegex(text, r"expected|cannot|required|unexpected|must|not |no |give|needs|at most|did you mean")

    def taken(self, kind, value):
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            json.dumps(kind.convert(value), allow_nan=False)
            return True
        return False

    def test_an_environment_from_stdin(self):
        server = self.serve(reply({"success": True, "new_contract": 5}))
        status, _, err = self.run_here(server, "create", "instance", "8", "--image", "a", "--env", "A=1", "--env", "-",
                                       stdin="-e TOKEN='x y' -p 80:80\n")
        self.assertEqual(status, 0, err)
        self.assertEqual(json.loads(server.requests[0]["body"])["env"], {"A": "1", "TOKEN": "x y", "-p 80:80": "1"})

    def test_numbers_with_units_and_values_that_are_named(self):
        create = ["create", "instance", "8", "--image", "a"]
        for line, words in (
                ([*create, "--disk", "24GB"], "write 24"), ([*create, "--disk", "1TB"], "in GB, 0 or more, not '1TB'"), ([*create, "--disk", "-1"], "not '-1'"),
                ([*create, "--bid_price", "$0.5"], "write 0.5"), ([*create, "--bid_price", "nan"], "not 'nan'"),
                ([*create, "--bid_price", "inf"], "not 'inf'"), ([*create, "--disk", "big"], "not 'big'"),
                ([*create, "--create-volume", "7", "--mount-path", "/root//volume"], "not '/root//volume'"),
                (["search", "offers", "--limit", "1,000"], "write 1000"), (["delete", "env-var", ""], "not ''"),
                (["launch", "instance", "-g", "A", "-n", "3", "-i", "a"], "not '3'"),
                (["show", "invoices", "-s", "2026-02-01", "-e", "2026-01-01"], "2026-02-01 00:00 is after the end date 2026-01-01 00:00"),
                (["show", "earnings", "-s", "2026-02-01", "-e", "2026-01-01"], "is after"),
                (["show", "invoices-v1", "-i", "-s", "2026-02-01", "-e", "2026-01-01"], "is after")):
            with self.subTest(line):
                status, out, err = self.run_here(self.server, *line)
                self.assertEqual((status, out), (2, ""))
                self.assertIn(words, err)
                self.refused(err.strip(), None)

    def test_numbers_that_were_meant(self):
        for text, unit, meant in (
                ("24GB", "GB", "24"), ("24 gb", "GB", "24"), ("1.5TB", "GB", ""), ("500 MB", "GB", ""), ("1Gbps", "Mb/s", ""),
                ("500mbps", "Mb/s", "500"), ("$0.41/hr", "$/hr", "0.41"), ("1,000", "N", "1000"), ("99%", "0 to 1", "0.99"),
                ("3 days", "days", "3"), ("36h", "days", ""), ("5m", "SECONDS", ""), ("24GB", "", ""), ("2 weeks", "days", ""), ("one", "N", ""), ("3k", "N", ""), ("", "N", ""),
                ("9" * 400, "N", "")):
            with self.subTest(text):
                self.assertEqual(vastai.meant_number(text, unit), meant)

    def test_ids_go_out_in_the_type_in_which_they_came(self):
        for method_id in (77, "77"):
            server = self.serve(reply({"success": True}))
            with contextlib.suppress(vastai.VastAIError):
                self.client(server).tfa_activate(method_id=method_id, code="123456", secret="s")
            sent = json.loads(server.requests[0]["body"])["tfa_method_id"]
            self.assertEqual((sent, type(sent)), (method_id, type(method_id)))

    def test_ids_in_an_array(self):
        """Those of other libraries compare item by item, and are neither true nor false."""
        class Array:
            def __iter__(self):
                return iter((7, 8))

            def __ne__(self, other):
                raise ValueError("ambiguous")

            __eq__ = __ne__

        server = self.serve(reply({"success": True}))
        self.client(server).start_instances(ids=Array())
        self.assertIn([7, 8], json.loads(server.requests[0]["body"]).values())

    def test_an_overlay_of_5000_digits_is_a_name(self):
        server = self.serve(reply({"success": True}))
        self.client(server).delete_overlay("9" * 5000)
        self.assertEqual(json.loads(server.requests[0]["body"]), {"overlay_name": "9" * 5000})

    def test_environments_that_cannot_be_read(self):
        for words in (["FOO BAR"], ["-e FOO"], ["-p web"], ["--sudo"], ["{A:1}"]):
            for line in (["create", "instance", "8", "--image", "a/b"], ["create", "template", "--image", "a"],
                         ["launch", "instance", "-g", "A", "-n", "1", "-i", "a"], ["update", "instance", "8"]):
                with self.subTest(line=line, words=words):
                    status, out, err = self.run_here(self.server, *line, f"--env={words[0]}")
                    self.assertEqual((status, out), (2, ""))
                    self.assertIn("--env: cannot read", err)
                    self.refused(err.strip(), None)
        with self.assertRaisesRegex(vastai.UsageError, "env: cannot read 'FOO'; write -e FOO=VALUE"):
            self.client(self.server).create_instance(8, "a/b", env="FOO BAR")
        self.assertEqual(self.server.requests, [])

    def test_environments_arrive_whole_in_both_faces(self):
        for line, env, left_out in (
                (["--env", "MODEL=x", "--env", "TOKEN=y z"], None, ""), (["--env", "MODEL=x", "--env", "TOKEN='y z'"],
                 {"MODEL": "x", "TOKEN": "y z"}, ""), (["--env", "-eX=1"], {"X": "1"}, ""), (["--env", "-p80:80"], {"-p 80:80": "1"}, ""),
                (["--env", "-p 80:80 --shm-size=16g"], {"-p 80:80": "1"}, "--shm-size"), (["--env", '{"A": "1"}'], {"A": "1"}, "")):
            with self.subTest(line):
                server = self.serve(reply({"success": True, "new_contract": 5}))
                status, _, err = self.run_here(server, "create", "instance", "8", "--image", "a/b", *line)
                self.assertEqual(status, 2 if env is None else 0, err)
                self.assertEqual([json.loads(request["body"])["env"] for request in server.requests], [] if env is None else [env])
                self.assertIn(left_out, err)
        server = self.serve(reply({"success": True, "new_contract": 5}))
        with self.assertWarnsRegex(UserWarning, "--gpus"):
            self.client(server).create_instance(8, "a/b", env="--gpus all -e A=1")
        self.assertEqual(json.loads(server.requests[0]["body"])["env"], {"A": "1"})
        server = self.serve(reply({"success": True}))
        path = os.path.join(self.folder, "on.sh")
        with open(path, "w", newline="") as file:
            file.write("\ufeffecho a\r\necho b\r\n")
        self.assertEqual(self.run_here(server, "update", "instance", "8", "--env", "A=1", "--onstart", path)[0], 0)
        self.assertEqual(json.loads(server.requests[0]["body"]), {"id": 8, "env": {"A": "1"}, "onstart": "echo a\necho b\n"})

    def test_conditions_that_no_offer_can_meet(self):
        for line in (["search", "offers", "verified=maybe"], ["search", "offers", "dph<$0.5"], ["search", "volumes", "reliability>99%"],
                     ["search", "offers", "gpu_ram>=24 georegion=EU"], ["search", "offers", "georegion=true"], ["search", "templates", "private=2"],
                     ["search", "invoices", "when>=02/30/2026"], ["create", "template", "--image", "a", "--search_params", "num_gpus=one"],
                     ["create", "workergroup", "--endpoint_id", "7", "--search_params", "num_gpus=one"],
                     ["launch", "instance", "-g", "A", "-n", "1", "-i", "a", "-r", ""],
                     ["launch", "instance", "-g", "A", "-n", "1", "-i", "a", "-r", "[]"],
                     ["launch", "instance", "-g", "A", "-n", "1", "-i", "a", "-r", "Atlantis"],
                     ["launch", "instance", "-g", 'A" num_gpus>=8 gpu_name="B', "-n", "1", "-i", "a"],
                     ["launch", "instance", "-g", "A num_gpus>=8", "-n", "1", "-i", "a"]):
            with self.subTest(line):
                status, out, err = self.run_here(self.server, *line)
                self.assertEqual((status, out), (2, ""))
                self.refused(err.strip(), None)
        client = self.client(self.server)
        for given in ({"region": "[]"}, {"num_gpus": "1 verified=any"}, {"gpu_name": "A=B"}):
            self.assertRaises(vastai.UsageError, client.launch_instance, **{"gpu_name": "A", "num_gpus": "1", "image": "a", **given})
        self.assertEqual(self.server.requests, [])

    def test_what_a_query_says_twice_is_told_of_in_both_faces(self):
        server = self.serve(reply({"offers": []}), reply({"offers": []}))
        status, _, err = self.run_here(server, "search", "offers", "num_gpus>=2 num_gpus>=4", "-o", "num_gpu")
        self.assertEqual(status, 0)
        self.assertIn("num_gpus>=4 replaces num_gpus>=2", err)
        self.assertIn("'num_gpus'", err)
        with self.assertWarnsRegex(UserWarning, "replaces num_gpus>=2"):
            self.client(server).search_offers("num_gpus>=2 num_gpus>=4")

    def test_a_line_without_a_command(self):
        for status, line in ((0, []), (0, ["--raw"]), (0, ["--help"]), (2, ["--bogus"]), (2, ["--retry"]), (2, ["-x"])):
            with self.subTest(line):
                found, out, err = self.run_here(None, *line)
                self.assertEqual((found, out == ""), (status, status > 0), err)

    def test_sdk(self):
        client, seen, kinds = self.client(self.server), 0, []
        for row in vastai.COMMANDS.values():
            if row.face == "cli":
                continue
            good = believable(row, "sdk", self.folder)
            for arg in row.args:
                if arg.face == "cli":
                    continue
                refused = [] if arg.kind in kinds else [value for value in BAD if not self.taken(arg.kind, value)]
                kinds.append(arg.kind)
                for value in [*NEVER, *refused]:
                    with self.subTest(command=row.name, argument=arg.name, value=type(value)):
                        with self.assertRaises((vastai.UsageError, TypeError)) as caught:
                            getattr(client, row.methods[0])(**{**good, arg.name: value})
                        self.refused(str(caught.exception), row)
                        seen += 1
        self.assertGreater(seen, 2000)

    def test_numbers(self):
        """Ids, counts, prices and sizes, in both faces."""
        bad = {"ID": ("-1", "1.5", "\u0661\u0662", "\uff17", "1e3", "", " ", "0x10", "nan", "inf", "9" * 30, "7 8"),
               "N": ("-1", "\u0661", "nan", "inf", "", "1e999", "1_0", "--"),
               "USD": ("-0.01", "nan", "-inf", "free", "", "\u0661", "$1"),
               "GB": ("-1", "nan", "1e400", "")}
        kinds = [vastai.ID, vastai.COUNT, vastai.NUMBER, vastai.PRICE, vastai.GB, vastai.IDS]
        seen, rng = [], random.Random(3)
        for row in vastai.COMMANDS.values():
            good = believable(row, "cli", self.folder)
            for arg in row.args:
                if arg.kind in kinds and not arg.rest:
                    texts = bad[arg.kind.metavar]
                    for text in texts if arg.kind not in seen else rng.sample(texts, 2):
                        if arg.kind is vastai.IDS and text == "7 8":
                            continue
                        if arg.face != "sdk" and row.face != "sdk":
                            with self.subTest(command=row.name, argument=arg.name, text=text):
                                status, out, err = self.run_here(self.server, *line_of(row, {**good, arg.name: text}))
                                self.assertEqual((status, out), (2, ""))
                                self.refused(err.strip(), row)
                        if arg.face != "cli" and row.face != "cli":
                            with self.subTest(command=row.name, argument=arg.name,
                                              text=text), self.assertRaises(vastai.UsageError):
                                getattr(self.client(self.server),
                                        row.methods[0])(**{**believable(row, "sdk", self.folder), arg.name: text})
                    seen.append(arg.kind)

    def test_command_lines(self):
        for row in vastai.COMMANDS.values():
            if row.face == "sdk" or row.name in ("help", "repl"):
                continue
            good = believable(row, "cli", self.folder)
            lines = [[*line_of(row, good), "--no-such-option"],
                     [*line_of(row, good), *["surplus"] * 9]] if not any(arg.many or arg.rest
                                                                         for arg in row.args) else []
            lines += [line_of(row, {name: value for name, value in good.items() if name != arg.name})
                      for arg in row.args if arg.name in good
                      and arg.cli is vastai.REQUIRED and arg.option]
            lines += [line_of(row, {**good, arg.name: text}) for arg in row.args if arg.face != "sdk"
                      and arg.kind is not vastai.FLAG and not arg.rest
                      for text in BAD_TEXT]
            for line in lines:
                with self.subTest(line=[word[:50] for word in line]):
                    status, out, err = self.run_here(self.server, *line)
                    self.assertEqual((status, out), (2, ""))
                    self.refused(err.strip(), row)

    def test_files(self):
        binary, zeros = os.path.join(self.folder, "binary"), os.path.join(self.folder, "zeros")
        with open(binary, "wb") as file:
            file.write(bytes(range(256)) * 100)
        with open(zeros, "wb") as file:
            file.write(bytes(1000))
        bad = ["/nonexistent/x", self.folder, binary, zeros, "\0", ""] + ["/dev/zero"] * os.path.exists("/dev/zero")
        lines = (["create", "instance", "7", "--image", "i", "--onstart"],
                 ["create", "team-role", "--name", "n", "--permissions"],
                 ["create", "api-key", "--name", "n", "--permission_file"])
        for line in lines:
            for path in bad:
                with self.subTest(line=line, path=path):
                    status, out, err = self.run_here(self.server, *line, path)
                    self.assertEqual((status, out), (2, ""))
                    self.refused(err.strip(), None)

    def test_dates(self):
        for text in ("2026-02-30", "13/13/2026", "tomorrow", "2026-01-05T25:00", "", "9" * 50, "0000-00-00",
                     "\u0662\u0660\u0662\u0666-01-01", "2026-01-05Z99",
                     "99999-01-01", "1e99"):
            for line in (["show", "audit-logs", "--after"], ["reboot", "instance", "7", "--schedule", "DAILY",
                                                             "--day=*", "--hour", "1", "--end_date"],
                         ["list", "machine", "7", "--price_gpu", "1", "--end_date"],
                         ["show", "charges", "--start-date"]):
                row = vastai.NAMES.get(" ".join(line[:2]))
                if row is None or not any(line[-1] in arg.flags for arg in row.args):
                    continue
                with self.subTest(line=line, text=text):
                    status, out, err = self.run_here(self.server, *line[:-1], f"{line[-1]}={text}")
                    self.assertEqual((status, out), (2, ""))
                    self.refused(err.strip(), row)

    def test_client(self):
        for given in ({"retry": 0}, {"retry": -1}, {"retry": "x"}, {"retry": 1.5}, {"retry": None}, {"timeout": 0},
                      {"timeout": -1}, {"timeout": float("nan")},
                      {"timeout": float("inf")}, {"timeout": "soon"}, {"server_url": "ftp://x"},
                      {"server_url": "console.vast.ai"}, {"server_url": "http://"},
                      {"server_url": "http://x y"}, {"server_url": "http://u:p@h"}, {"server_url": "http://h?x=1"},
                      {"server_url": "http://h/#x"},
                      {"server_url": "http://h:0"}, {"server_url": "http://h:99999"}, {"server_url": "http://h:x"},
                      {"server_url": "http://[::1"},
                      {"server_url": "http://h\n"}, {"server_url": "http://h\u00e4"}):
            with self.subTest(given=given), self.assertRaises(vastai.UsageError):
                vastai.VastAI(KEY, **given)
        self.assertIsInstance(vastai.VastAI(KEY, retry="5").retry, int)
        for text in ("x", "0", "-1", "1.5", ""):
            self.assertEqual(self.run_here(self.server, "show", "user", f"--retry={text}")[0], 2)
        self.assertEqual(self.run_here("ftp://x", "show", "user")[0], 2)

    def test_methods(self):
        client = self.client(self.server)
        for call in (lambda: client.show_instance(), lambda: client.show_instance(1, 2),
                     lambda: client.show_instance(1, id=2), lambda: client.show_instance(ident=1),
                     lambda: client.no_such_method):
            with self.assertRaises((TypeError, AttributeError)):
                call()


# ------------------------------------------------------------------ faults: signals, streams, homes


@unittest.skipUnless(os.name == "posix", "signals and redirections of POSIX")
class TestProcesses(FaultCase):
    def shell(self, line, env=()):
        """A shell line in which "vastai" is this program: (exit status, stdout, stderr)."""
        program = f"{sys.executable} {compiled()}"
        environment = {**os.environ, "VAST_API_KEY": KEY, **dict(env)}
        done = subprocess.run(["/bin/sh", "-c", line.replace("vastai", program)], stdin=subprocess.DEVNULL,
                              capture_output=True, timeout=20, cwd=self.home,
                              env={k: v for k, v in environment.items() if v is not None})
        out, err = done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace")
        self.assertNotIn("Traceback", err)
        self.assertNotIn("Exception ignored", err)
        return done.returncode, out, err

    def interrupt(self, *words, ready, stdin=subprocess.DEVNULL, number=signal.SIGINT):
        process = self.start_process(*words, stdin=stdin, env={**os.environ, "VAST_API_KEY": KEY})
        for _ in range(1000):
            if ready(process):
                break
            time.sleep(0.005)
        time.sleep(0.05)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def test_dates_are_utc_in_every_zone(self):
        self.addCleanup(time.tzset)
        for zone, (command, wanted), (start, end) in itertools.product(
                ("UTC", "America/New_York", "Asia/Tokyo"),
                (("show invoices", {"sdate": "1767225600", "edate": "1769817600"}), ("show earnings", {"sday": "20454", "eday": "20484"})),
                (("2026-01-01", "2026-01-31"), ("01/01/2026", "1769817600"))):
            with self.subTest(zone=zone, command=command, start=start), mock.patch.dict(os.environ, TZ=zone):
                time.tzset()
                server = self.serve(reply({"invoices": [], "current": {}}))
                self.run_here(server, *command.split(), "-s", start, "-e", end, "--raw")
                query = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(server.requests[0]["target"]).query))
                self.assertEqual({name: query.get(name) for name in wanted}, wanted)

    def test_interrupted(self):
        stalled = self.serve(stall)
        half = self.serve(stuck(reply(LONG)[:-9]))
        paused = self.serve(reply("", 429, Retry_After="50"))
        waiting = self.serve(reply({"instances": {"id": 7, "actual_status": "loading"}}))
        for server, words in ((stalled, "show user"), (stalled, "create team --team-name t"),
                              (half, "show user --raw"), (paused, "show user"),
                              (waiting, "wait instance 7")):
            with self.subTest(words=words):
                del server.requests[:]
                status, out, err = self.interrupt(*words.split(), "--url", server.url, ready=lambda process,
                                                  server=server: server.requests)
                err = err.replace(b"instance 7: loading\n", b"")  # its progress
                self.assertEqual((status, out, err), (130, b"", b""))
        for words, told in (("prepay instance 7 5", b"Check with `vastai show deposit`"),
                            ("create volume 7 --size 5", b"Check with `vastai show volumes`"),
                            ("create team --team-name t --transfer-credit 50", b"Check with `vastai show members`"),
                            ("reset api-key", b"Check with `vastai show user`"),
                            ("tfa regen-codes -c 123456 -y", b"Check with `vastai tfa status`")):
            for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
                server = self.serve(stall)
                status, out, err = self.interrupt(*words.split(), "--url", server.url, number=number,
                                                  ready=lambda process, server=server: server.requests)
                self.assertEqual((status, out, told in err), (expected, b"", True), err)
        pending = reply({"pending_price_increases": [{"contract_id": id, "pending_price_increase_id": id} for id in range(1, 9)]})
        for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
            server = self.serve(pending, reply({"success": True}), stall)
            status, out, err = self.interrupt(*"accept price-increase 1 2 3 4 5 6 7 8 -y --url".split(), server.url, number=number,
                                              ready=lambda process, server=server: len(server.requests) == 7)
            self.assertEqual((status, out), (expected, b""), err)
            self.assertIn(b"2 of 8 failed: 7, 8; the outcome of 5 is unknown: 2, 3, 4, 5, 6", err)
        status, out, err = self.interrupt("destroy", "instance", "7", "--url", "http://127.0.0.1:9",
                                          stdin=subprocess.PIPE,
                                          ready=lambda process: select.select([process.stderr], [], [], 0)[0])
        self.assertEqual((status, out, b"Traceback" in err), (130, b"", False))

    def test_head(self):
        server = self.serve(reply([{"id": n, "public_key": "x" * 500} for n in range(2000)]))
        for form in ("", "--raw"):
            _, out, err = self.shell(f"vastai show ssh-keys --url {server.url} {form} | head -2")
            self.assertEqual((out.count("\n"), err), (2, ""))
        self.assertEqual(self.shell("vastai --help | head -1")[1:],
                         ("usage: vastai COMMAND [argument …] [option …]\n", ""))
        for words in (f"show ssh-keys --fields id --url {server.url}", "--help", "show nothing 2>&1"):
            self.assertEqual(self.shell(f"vastai {words} | true"), (0, "", ""))

    def test_a_failure_that_nobody_reads(self):
        server = self.serve(reply({"success": True}), reply({"msg": "bad ids"}, 400))
        ids = " ".join(map(str, range(1, 70)))
        line = f"{{ vastai destroy instances {ids} -y --url {server.url}; echo status $? >&2; }} | true"
        self.assertIn("status 8", self.shell(line)[2])

    def test_what_money_brought_reaches_a_reader(self):
        server = self.serve(reply({"success": True, "new_contract": 7, "volume_name": "V7"}))
        for line in ("create instance 5 --image i --raw", "create volume 5 --size 9"):
            for redirection in (">&-", ">/dev/full")[:1 + os.path.exists("/dev/full")]:
                err = self.shell(f"vastai {line} --url {server.url} {redirection}")[2]
                self.assertIn("'new_contract': 7", err)
        members = {"id": 7, "key": "new-key", "new_api_key": "new-key", "secret": "new-key", "uri": "otpauth://x", "msg": f"not {KEY}"}
        server = self.serve(reply({"success": True, **members, "webhook": {"id": 7, "webhook_secret": "new-key"}}))
        for line in ("reset api-key", "create api-key --name x", "create webhook https://h/ low_credit", "rotate webhook-secret 7",
                     "tfa totp-setup", "tfa send-sms"):
            for redirection in (">&-", ">/dev/full")[:1 + os.path.exists("/dev/full")]:
                err = self.shell(f"vastai {line} --url {server.url} {redirection}")[2]
                self.assertEqual(("new-key" in err, KEY in err), (True, False), err)
        server = self.serve(reply({"success": True, "backup_codes": ["8351-22", "8351-23"]}))
        line = f"vastai tfa regen-codes -c 1234 -y --url {server.url}"
        for answers, left in (("3\\ny\\n", True), ("1\\n", False)) if os.path.exists("/dev/full") else ():
            status, _, err = self.shell(f"printf '{answers}' | {line} >/dev/full")
            self.assertEqual((status, "are lost, and the old ones no longer work" in err, "8351" in err), (1, left, False), err)
        process = self.start_process(*line.split()[1:], stdin=subprocess.PIPE, env={**os.environ, "VAST_API_KEY": KEY})
        self.assertIn(b"2 new backup codes", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        self.assertIn(b"are lost, and the old ones no longer work", process.communicate(timeout=60)[1])

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full here")
    def test_full_disk(self):
        server = self.serve(reply([{"id": n} for n in range(9)]))
        for line in (f"vastai show ssh-keys --url {server.url} >/dev/full",
                     f"vastai show ssh-keys --raw --url {server.url} >/dev/full", "vastai --help >/dev/full",
                     "vastai --version >/dev/full"):
            status, out, err = self.shell(line)
            self.assertEqual((status, out), (1, ""))
            self.assertRegex(err, ('^{"error": true, .*' if "--raw" in line else "^vastai: .*") + "[Nn]o space")
        status, out, err = self.shell(f"vastai show ssh-keys --explain --url {server.url} 2>/dev/full")
        self.assertEqual((status, out.count("\n")), (0, 10))
        self.assertEqual(self.shell("vastai show nothing 2>/dev/full")[0], 2)

    def test_closed_streams(self):
        server = self.serve(reply([{"id": n} for n in range(9)]))
        command = f"vastai show ssh-keys --url {server.url}"
        for streams in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
            status, out, err = self.shell(f"{command} --explain {streams}")
            self.assertEqual((status, bool(out), bool(err)), (0, ">&-" not in streams.split(), "2>&-" not in streams))
            for words, status in (("show instance", 2), ("--help", 0),
                                  ("destroy instance 7", 2))[:3 if streams[0] == "<" else 1]:
                self.assertEqual(self.shell(f"vastai {words} {streams}")[0], status)

    def test_no_streams_in_process(self):
        server = self.serve(reply([{"id": 7}]), reply({"success": True}))
        for words, status in ((["show", "ssh-keys"], 0), (["show", "ssh-keys", "--raw"], 1), (["show", "nothing"], 2),
                              (["--help"], 0), (["destroy", "instance", "7"], 2),
                              (["show", "ssh-keys", "--explain"], 1), (["label", "instance", "7", "x"], 0),
                              (["set", "api-key", "-"], 2)):
            with mock.patch.multiple(sys, stdout=None, stderr=None, stdin=None):
                got = vastai.main([*words, "--url", server.url, "--api-key", KEY])
            self.assertEqual(got, status)
        closed = io.StringIO()
        closed.close()
        with mock.patch.multiple(sys, stdout=closed, stderr=closed, stdin=closed):
            self.assertEqual(vastai.main(["show", "nothing"]), 2)
        parts = []
        least = types.SimpleNamespace(write=parts.append)  # all that some programs put there
        with mock.patch.multiple(sys, stdout=least, stderr=least, stdin=None):
            self.assertEqual([vastai.main(words) for words in (["--version"], ["show", "nothing"])], [0, 2])
        self.assertTrue("".join(parts).startswith(f"{vastai.__version__}\nno command 'show nothing'"), parts)

    def test_homes(self):
        server = self.serve(reply(USER))
        blocked = os.path.join(self.home, "blocked")
        os.mkdir(blocked, 0o000)
        self.addCleanup(os.chmod, blocked, 0o700)
        for env in ({"HOME": None}, {"HOME": ""}, {"HOME": "/dev/null"}, {"HOME": blocked}):
            with self.subTest(env=env):
                status, out, err = self.run_process("show", "user", "--url", server.url, env=env)
                self.assertEqual((status, err.count("\n"), err[:7]), (0, 1, "API key"))
        self.assertEqual(self.run_process("set", "api-key", "new-key-123456789", env={"HOME": "/dev/null"})[0], 2)
        status, out, err = self.run_process("show", "user", env={"HOME": "/nonexistent", "VAST_API_KEY": None})
        self.assertEqual((status, out), (3, ""))
        self.assertIn("VAST_API_KEY", err)

    def test_encodings(self):
        name = "Jos\u00e9 \u4e16\u754c \U0001f600"
        server = self.serve(reply([{"id": 7, "public_key": name}]))
        for env in ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "cp1252"},
                    {"PYTHONIOENCODING": "ascii:strict"}):
            with self.subTest(env=env):
                status, out, err = self.run_process("show", "ssh-keys", "--url", server.url, env=env)
                self.assertEqual((status, err), (0, ""))
                self.assertIn("7", out)
                self.assertEqual(self.run_process("show", "instances", "--help", env=env)[0], 0)
        self.assertIn("Jos\\xe9", self.run_process("show", "ssh-keys", "--format", "csv", "--url", server.url,
                                                env={"PYTHONIOENCODING": "ascii"})[1])
        self.assertEqual(self.run_process("show", "\u4e16", env={"PYTHONIOENCODING": "ascii"})[0], 2)
        err = self.run_process("show", "user", "--url", self.serve(reply(USER)).url, env={"PYTHONIOENCODING": "ascii"}).stderr
        self.assertIn("API key ending in ...", err)

    def test_debug(self):
        process = self.start_process("show", "instance", "x", env={**os.environ, "VASTAI_DEBUG": "1", "VAST_API_KEY": KEY})
        err = process.communicate(timeout=60)[1]
        self.assertEqual((process.returncode, b"Traceback" in err, KEY.encode() in err), (1, True, False))


# -------------------------------------------------------------------------------- faults: at random


class TestAtRandom(FaultCase):
    """Generated sequences of faults against what the contract says of them."""

    ANSWERS = {200: None, 400: "VastAIError", 401: "AuthError", 403: "AuthError", 404: "NotFoundError",
               410: "NotFoundError", 418: "VastAIError", 500: "VastAIError",
               501: "VastAIError"}

    def expected(self, names, safe, retry):
        """(the exception's name or None, how many requests): the whole of the rules, once more."""
        sent = 0
        for attempt in range(1, retry + 1):
            name = names[min(attempt, len(names)) - 1]
            sent += name != "closes at once"
            if name in self.ANSWERS:
                return self.ANSWERS[name], sent
            if name == 429:
                last = "RateLimitError"
            elif not safe:
                return "OutcomeUnknownError", sent
            else:
                last = "VastAIError" if str(name).isdigit() else "NetworkError"
        return last, sent

    def test_sequences(self):
        rng = random.Random(2026)
        ways = {**{int(name) if name.isdigit() else name: step for name, step in LOST.items()},
                **{status: reply({"msg": "m"}, status) for status in self.ANSWERS},
                429: reply("", 429, Retry_After="0")}
        common = [name for name in ways if name not in self.ANSWERS]
        for number in range(250):
            names = [rng.choice(common if rng.random() < 0.8 else list(ways))
                     for _ in range(rng.randrange(1, 7))] + [rng.choice(list(self.ANSWERS))]
            safe, retry = rng.random() < 0.5, rng.randrange(1, 8)
            with self.subTest(number=number, names=names, safe=safe, retry=retry):
                server = self.serve(*(ways[name] for name in names))
                client = self.client(server, retry=retry)
                server.steps = [  # or an answer lost on a kept connection would be asked for once more, on a new one
                    step.replace(b"\r\n", b"\r\nConnection: close\r\n", 1) if isinstance(step, bytes) else step
                    for step in server.steps]
                call, args = rng.choice([(client.show_user, ()), (client.label_instance, (7, "x"))] if safe else
                                        [(client.create_team, ("t",)), (client.create_instance, (7, "i")),
                                         (client.reboot_instance, (7,))])
                try:
                    call(*args)
                    family = None
                except vastai.VastAIError as error:
                    family = type(error).__name__
                    self.assertNotIn(KEY, str(error) + repr(error.body))
                self.assertEqual((family, len(server.requests)), self.expected(names, safe, retry))
                for request in server.requests:
                    self.assertEqual(request["headers"]["authorization"], f"Bearer {KEY}")
                    self.assertNotIn(KEY, request["target"] + request["body"].decode())
            server.__exit__()

    def test_garbage(self):
        """Answers with random damage: an answer or a VastAIError, nothing else, and no more requests than allowed."""
        rng = random.Random(7)
        whole = [reply({"id": 7, "text": "x" * 50}), reply(gzip.compress(json.dumps(USER).encode()), **GZIP),
                 reply("", 302, Location="/x"), reply("", 429, Retry_After="0"),
                 CHUNKED.encode() + b'9\r\n{"id": 7}\r\n0\r\n\r\n']
        server = self.serve(hang_up)
        client = self.client(server, retry=2, timeout=0.5)
        for number in range(300):
            data = bytearray(rng.choice(whole))
            for _ in range(rng.randrange(1, 6)):
                at = rng.randrange(len(data))
                data[at:at + rng.randrange(3)] = bytes(rng.randrange(256) for _ in range(rng.randrange(3)))
            server.steps, server.requests = [cut(bytes(data))], []
            call = client.show_user if number % 2 else lambda: client.create_team("t")
            with self.subTest(number=number, data=bytes(data)):
                try:
                    self.assertIsInstance(call(), dict)
                except vastai.VastAIError as error:
                    self.assertNotIsInstance(error, vastai.UsageError)
                posts = [request for request in server.requests if request["method"] == "POST"
                         and request["path"].endswith("/team/")]
                self.assertLessEqual(len(posts), 2 if b"429" in data[:20] or b"307" in data[:20] else 1)
                self.assertLessEqual(len(server.requests), 12)


# --------------------------------------------------------------------------------------- serverless

ENDPOINT_KEY = "endpoint-key-5c2b81f09a7d"
ENDPOINT = {"id": 321, "endpoint_name": "tests", "api_key": ENDPOINT_KEY, "user_id": 7, "created_at": 1.76e9,
            "max_workers": 4}
WAITING = {"request_idx": 42, "status": "total workers: 1, loading workers: 1"}
EVENTS = [{"choices": [{"text": "Pa"}]}, {"choices": [{"text": "ris"}]}]


def chunked(*pieces, end=True, **headers):
    """A streamed answer, each piece a chunk of its own."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n{lines}Transfer-Encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return head.encode() + body + (b"0\r\n\r\n" if end else b"")


def event(value):
    return b"data: %s\n\n" % json.dumps(value).encode()


def until_gone(data):
    """Sends this and waits until the client hangs up, which is noted in `gone`."""
    def step(faulty, sock, request):
        sock.sendall(data)
        sock.settimeout(5)
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
        faulty.gone.set()
    return step


def in_two_parts(data):
    """Sends the last 20 bytes of this after `gone`."""
    def step(faulty, sock, request):
        sock.sendall(data[:-20])
        faulty.gone.wait(5)
        sock.sendall(data[-20:])
        return True
    return step


class Hasty(Faulty):
    """Answers as soon as the headers have come, and leaves the body where it is."""

    def __init__(self, *steps):
        super().__init__(*steps)
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # it does not grow
    def read(self, file):
        lines = []
        while lines[-1:] not in ([b"\r\n"], [b""]):
            lines.append(file.readline())
        return super().read(io.BytesIO(b"".join(lines)))


LARGE = {"a": "x" * 8_000_000}  # more than all buffers between client and server hold


class ServerlessCase(FaultCase):
    """One server that is console, router and worker; `router` and `worker` are the steps of those two."""

    def setUp(self):
        super().setUp()
        vastai._roots.clear()
        self.server = self.serve(route=self.step)
        self.server.gone = threading.Event()
        self.worker_url = self.server.url
        self.router, self.worker = [{}], [reply({"n": 1}, Content_Type="application/json")]

    def step(self, request):
        if request["path"].startswith("/api/v0/endptjobs/3"):
            return reply({"success": True, "result": dict(ENDPOINT, api_key="renewed-key")})
        if request["path"].startswith("/api/v0/"):
            return reply({"success": True, "results": [ENDPOINT]})
        if request["path"].startswith("/static/"):
            return reply(pem("CERTIFICATE", CERTIFICATE))
        steps = self.router if request["path"] == "/route/" else self.worker
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        if isinstance(step, dict):
            grant = {"endpoint": "tests", "url": self.worker_url, "cost": 1, "reqnum": 5, "request_idx": 42,
                     "signature": "c2ln"}
            return reply({**grant, **step})
        return step

    def sent(self, path):
        return [request for request in self.server.requests if request["path"] == path]

    def program(self, program, kind="Serverless", **options):
        """What `await program(client, endpoint)` returns."""
        async def main():
            options.setdefault("max_poll_interval", 0.01)
            async with getattr(vastai, kind)(KEY, autoscaler_url=self.server.url, webserver_url=self.server.url,
                                             **options) as client:
                client.SSL_CERT_URL = self.server.url + "/static/root.cer"
                return await program(client, vastai.Endpoint(client, "tests", 321, ENDPOINT_KEY))
        return asyncio.run(asyncio.wait_for(main(), 15))

    def ask(self, **options):
        """One request to the worker's /work; in both drivers, which must agree."""
        payload = options.pop("payload", {"a": 1})
        return self.program(lambda client, endpoint: endpoint.request("/work", payload, **options))

    def listen(self, **options):
        """The events of a streamed request."""
        async def program(client, endpoint):
            answer = await endpoint.request("/work", {}, stream=True, **options)
            return [event async for event in answer["response"]]
        return self.program(program)


class TestJobs(ServerlessCase):
    """A job is sent once, unless the caller lets it be repeated."""

    LOSSES = (hang_up, reset, cut(b"HTTP/1.1 200 OK\r\nConte"), cut(reply({"n": 1})[:-3]), cut(chunked(b'{"n"', end=False)))

    def test_lost(self):
        for loss in self.LOSSES:
            for kind in ("Serverless", "CoroutineServerless"):
                self.worker, self.server.requests = [loss], []
                error = self.error(self.program, lambda client, endpoint: endpoint.request("/work", {}, retry=False), kind)
                self.assertIsInstance(error, vastai.OutcomeUnknownError)
                self.assertIsInstance(error, ConnectionError)
                self.assertIn("outcome is unknown", str(error))
                self.assertEqual(len(self.sent("/work")), 1)

    def test_lost_and_repeated(self):
        self.worker = [*self.LOSSES, reply({"n": 2})]
        self.assertEqual(self.ask()["response"], {"n": 2})
        self.assertEqual(len(self.sent("/work")), len(self.LOSSES) + 1)
        self.worker, self.server.requests = [hang_up], []
        self.assertIsInstance(self.error(self.ask, max_retries=3), vastai.OutcomeUnknownError)
        self.assertEqual(len(self.sent("/work")), 3)

    def test_slow(self):
        self.worker = [stall]
        for options in ({"worker_timeout": 0.2, "retry": False}, {"timeout": 0.3}):
            self.server.requests = []
            error = self.error(self.ask, **options)
            self.assertIsInstance(error, vastai.OutcomeUnknownError)
            self.assertIsInstance(error, asyncio.TimeoutError)
            self.assertEqual(len(self.sent("/work")), 1)

    def test_lost_then_something_else(self):
        """Whatever comes after a lost job, its outcome stays unknown."""
        self.worker, self.router = [hang_up], [{}, reply("no such endpoint", 404)]
        error = self.error(self.ask)
        self.assertIsInstance(error, vastai.OutcomeUnknownError)
        self.assertIn("HTTP 404 - no such endpoint", str(error))

    def test_broken_answer(self):
        self.worker = [reply('{"n": ', Content_Type="application/json")]
        error = self.error(self.ask)
        self.assertEqual((len(self.sent("/work")), error.body), (1, '{"n": '))
        self.assertIn("broken JSON", str(error))

    def test_refusing(self):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.worker_url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            error = self.error(self.ask, timeout=1)
            self.assertIsInstance(error, vastai.WaitTimeoutError)
            self.assertIsInstance(error, asyncio.TimeoutError)
            self.assertIn("refused", str(error))
            for options, tries in (({"max_retries": 2}, 2), ({"retry": False}, 5)):
                self.server.requests = []
                error = self.error(self.ask, **options)
                self.assertIsInstance(error, (vastai.NetworkError, ConnectionError))
                self.assertEqual(len(self.sent("/route/")), tries)
            self.router = [{}, {"url": self.server.url}]
            self.assertEqual(self.ask(retry=False)["response"], {"n": 1})

    def test_addresses_that_are_none(self):
        for self.worker_url in ("http://", "http://[::1", "http://127.0.0.1:99999"):
            self.assertIsInstance(self.error(self.ask, max_retries=1), vastai.NetworkError)

    def test_failing(self):
        self.worker = [reply("boom", 500), reply("busy", 429), reply({"n": 3})]
        self.assertEqual(self.ask()["response"], {"n": 3})
        self.worker = [reply("odd", 600), reply({"n": 4})]
        self.assertEqual(self.ask()["status"], 600)
        self.worker = [reply("boom", 500)]
        for options, tries in (({"retry": False}, 1), ({"max_retries": 3}, 3)):
            self.server.requests = []
            answer = self.ask(**options)
            self.assertEqual((answer["ok"], answer["status"], answer["response"]), (False, 500, {"error": "boom"}))
            self.assertEqual(len(self.sent("/work")), tries)

    def test_answers(self):
        for body, kind, response, text in (
                (b'{"a": "\xc5\xbe"}', "application/json", {"a": "ž"}, '{"a": "ž"}'), (b"[1]", None, [1], "[1]"),
                (b"", None, None, ""), (b"\xe9", "text/plain; charset=latin-1", "é", "é"), (b"[1]", "text/plain", [1], "[1]"),
                (b"{no", "text/plain", "{no", "{no"), (b"\x89PNG\xff", "image/png", b"\x89PNG\xff", ""),
                (b' {"a": 1}', "application/octet-stream", {"a": 1}, ""), (b"NaN", "application/json; x", None, "NaN"),
                (b"\xe9", "text/plain; charset=idna", "\ufffd", "\ufffd")):
            self.worker = [reply(body, Content_Type=kind)]
            answer = self.ask()
            if body != b"NaN":
                self.assertEqual(answer["response"], response)
            self.assertEqual((answer["text"], answer["content_type"]), (text, (kind or "").partition(";")[0]))
        self.worker = [reply(gzip.compress(b'{"z": 1}'), Content_Encoding="gzip")]
        self.assertEqual(self.ask()["response"], {"z": 1})
        self.worker = [b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n"]  # which has no body all the same
        self.assertIsNone(self.ask(timeout=5, worker_timeout=0)["response"])  # 0: no limit, as in the official client
        with mock.patch("vastai.LARGEST_ANSWER", 1000):  # of the service, not of a worker
            for options in ({}, {"Content_Encoding": "gzip"}):
                text = b" " * 2000
                self.worker = [reply(gzip.compress(text) if options else text, Content_Type="text/plain", **options)]
                self.assertEqual(len(self.ask()["response"]), 2000)

    def test_what_is_sent(self):
        self.ask(payload={"half": "\ud800"})
        self.assertEqual(json.loads(self.sent("/work")[0]["body"])["payload"], {"half": "\ud800"})
        self.server.requests = []
        self.ask(payload={"text": "ž"}, cost=8)
        (route,), (job,) = self.sent("/route/"), self.sent("/work")
        self.assertEqual(route["headers"]["authorization"], f"Bearer {ENDPOINT_KEY}")
        self.assertEqual(json.loads(route["body"]), {"endpoint": "tests", "api_key": ENDPOINT_KEY, "cost": 8,
                                                     "request_idx": 0, "replay_timeout": 60.0})
        self.assertNotIn("authorization", job["headers"])
        self.assertEqual(job["target"], "/work")
        self.assertEqual(sorted(json.loads(job["body"])["auth_data"]),
                         ["cost", "endpoint", "reqnum", "request_idx", "signature", "url"])

    def test_what_is_not(self):
        for payload in ({"a": float("nan")}, {"a": object()}):
            self.assertIsInstance(self.error(self.ask, payload=payload), vastai.UsageError)
        for route in ("", None, "/\ud800"):
            with self.assertRaises(vastai.UsageError):
                self.program(lambda client, endpoint, route=route: endpoint.request(route, {}))
        self.assertEqual(self.server.requests, [])

    def test_kept_connections(self):
        """A worker's idle connection is used again while it is open; that it was closed costs no job."""
        async def program(client, endpoint):
            for _ in range(3):
                self.assertTrue((await endpoint.request("/work", {}, retry=False))["ok"])
            before = self.server.connections
            self.server.hang_up()
            await asyncio.sleep(0.05)
            self.assertTrue((await endpoint.request("/work", {}, retry=False))["ok"])
            return before
        self.assertEqual(self.program(program), 1)
        self.assertEqual(len(self.sent("/work")), 4)

    def test_late_answers(self):
        """What comes on an idle connection is not the answer to the next job."""
        over = threading.Event()

        def twice(faulty, sock, request):
            sock.sendall(reply({"n": 1}))
            over.wait(5)
            sock.sendall(reply({"n": "late"}))
            over.clear()
            return True
        self.worker = [twice, reply({"n": 2})]

        async def program(client, endpoint):
            await endpoint.request("/work", {})
            over.set()
            while over.is_set():
                await asyncio.sleep(0.01)
            return (await endpoint.request("/work", {}))["response"]
        self.assertEqual(self.program(program), {"n": 2})

    def test_early_answers(self):
        """An answer that comes before the whole job has left is one; that connection is not used again."""
        async def program(client, endpoint):
            return [(await endpoint.request("/work", payload, retry=False))["status"] for payload in (LARGE, {})]
        for step in (stuck(reply("too large", 413)), cut(reply("too large", 413))):
            hasty = Hasty(step)
            self.addCleanup(hasty.__exit__)
            self.worker_url = hasty.url
            self.assertEqual(self.program(program), [413, 413])
        error = self.error(self.client(self.server).request, "tests", "/work", LARGE, retry=False)
        self.assertEqual(error.status, 413)

    def test_connections_end(self):
        """A connection that is not kept is gone at once, and a kept one after a while."""
        async def program(client, endpoint):
            await endpoint.request("/work", {})
            gc.collect()
            alive = [one for one in gc.get_objects() if isinstance(one, vastai.Connection)]
            self.assertNotIn(self.server.port, [one.place.port for one in alive])
            self.worker = [reply({"n": 1})]
            with mock.patch("vastai.Connection.IDLE", 0.05):
                await endpoint.request("/work", {})
            while any(client.streams().pool.idle.values()):
                await asyncio.sleep(0.01)
        self.worker = [reply({"n": 1}, Connection="close")]
        self.program(program)


class TestRouter(ServerlessCase):
    def test_waiting(self):
        self.router = [reply(WAITING), reply(dict(WAITING, url=None)), reply("oops", 502), hang_up, {}]
        answer = self.ask()
        self.assertEqual((answer["response"], answer["request_idx"], answer["url"]), ({"n": 1}, 42, self.server.url))
        self.assertEqual([json.loads(request["body"])["request_idx"] for request in self.sent("/route/")],
                         [0, 42, 42, 42, 42])

    def test_nobody_comes(self):
        self.router = [reply(WAITING)]
        error = self.error(self.ask, timeout=0.2)
        self.assertIsInstance(error, vastai.WaitTimeoutError)
        self.assertIsInstance(error, asyncio.TimeoutError)
        self.assertIn("loading workers: 1", str(error))

    def test_refusals(self):
        for step, words, tries in ((reply("no such endpoint", 404), "HTTP 404 - no such endpoint", 1),
                                   (reply({"error_msg": "invalid key"}), "invalid key", 1), (reply("<html>"), "route", 1),
                                   (reply({"url": "ftp://x"}), "route", 1),
                                   (reply({"url": "http://x\nError: y"}), r"x\nError: y", 1), (reply("oops", 502), "HTTP 502 - oops", 5),
                                   (hang_up, f"no answer from {self.server.url}: the connection was closed", 5)):
            self.router, self.server.requests = [step], []
            error = self.error(self.ask)
            self.assertIsInstance(error, RuntimeError)
            self.assertIn(words, str(error))
            self.assertIn("route", str(error))
            self.assertEqual((len(self.sent("/route/")), self.sent("/work")), (tries, []))

    def test_echoed_key(self):
        self.router = [reply(f"bad key {ENDPOINT_KEY}", 403)]
        error = self.error(self.ask)
        self.assertNotIn(ENDPOINT_KEY, str(error) + repr(error.body))
        self.assertIsInstance(error, vastai.AuthError)

    def test_redirected(self):
        self.router = [reply("", 307, Location="/route/?again"), {}]
        self.assertTrue(self.ask()["ok"])
        self.assertEqual(self.sent("/route/")[1]["headers"]["authorization"], f"Bearer {ENDPOINT_KEY}")
        other = self.serve(reply("not for you"))
        self.router = [reply("", 307, Location=other.url)]
        self.assertIn("HTTP 307", str(self.error(self.ask)))
        self.server.route = lambda request: reply("", 307, Location=other.url)
        self.assertIn("HTTP 307", str(self.error(self.program, lambda client, endpoint: endpoint.get_workers())))
        self.assertEqual(other.requests, [])  # the account's key stands in the body


class TestEvents(ServerlessCase):
    def test_events(self):
        whole = b": hello\r\nevent: x\r\n" + event(EVENTS[0]) + b"data: {broken\n\n" + event(EVENTS[1]) + b"data: [DONE]\n\n"
        lines = "\n".join(map(json.dumps, EVENTS)).encode()  # the last one without a newline
        members = b"".join(map(gzip.compress, lines.splitlines(True)))
        for answer in (chunked(whole), chunked(*(whole[at:at + 1] for at in range(len(whole)))), chunked(lines),
                       reply(lines), chunked(gzip.compress(lines), Content_Encoding="gzip"),
                       *(chunked(*pieces, Content_Encoding="gzip") for pieces in ([members], [members[:9], members[9:]]))):
            self.worker = [answer]
            self.assertEqual(self.listen(), EVENTS)
        self.worker = [cut(b"HTTP/1.0 200 OK\r\n\r\n" + lines)]  # up to the end of the connection
        self.assertEqual(self.listen(), EVENTS)

    def test_cut(self):
        packed = gzip.compress(event(1) + b"2")
        for step in (cut(chunked(event(1), end=False)), cut(reply(event(1), Content_Length=99)),
                     *(chunked(packed[:end], Content_Encoding="gzip") for end in (5, -9, -1))):
            self.worker = [step]
            error = self.error(self.listen)
            self.assertIsInstance(error, ConnectionError)
            self.assertIsInstance(error, vastai.OutcomeUnknownError)

    def test_stuck(self):
        for data, options in ((chunked(end=False), {"timeout": 0.2}), (chunked(event(1), end=False), {"worker_timeout": 0.2}),
                              (b"", {"timeout": 0.2})):
            self.worker = [stuck(data)]
            self.assertIsInstance(self.error(self.listen, **options), asyncio.TimeoutError)
        self.worker = [trickle(chunked(*map(event, range(9))), 0.001)]
        self.assertEqual(self.listen(timeout=5), list(range(9)))

    def test_first_piece(self):
        """It ends the request's time also if it comes together with the headers."""
        self.worker = [in_two_parts(chunked(event(1), event(2)))]

        async def program(client, endpoint):
            events = (await endpoint.request("/work", {}, stream=True, timeout=5))["response"]
            now = time.monotonic
            with mock.patch("time.monotonic", lambda: now() + 9):
                self.assertEqual(await events.__anext__(), 1)
                self.server.gone.set()
                return [value async for value in events]
        self.assertEqual(self.program(program), [2])

    def test_hanging_up(self):
        """Whoever no longer listens closes the connection, which ends the worker's job."""
        async def closed(client, endpoint):
            answer = await endpoint.request("/work", {}, stream=True)
            async for _ in answer["response"]:
                break
            await answer["response"].aclose()
            await self.hung_up()

        async def forgotten(client, endpoint):
            async for _ in (await endpoint.request("/work", {}, stream=True))["response"]:
                break
            await self.hung_up()

        async def never_read(client, endpoint):
            for _ in range(2):  # the second waits until the first has given its connection back
                await endpoint.request("/work", {}, stream=True)
                gc.collect()
                await self.hung_up()

        async def left(client, endpoint):
            answer = await endpoint.request("/work", {}, stream=True)
            await client.close()
            await self.hung_up()
            with self.assertRaises(ConnectionError):
                [event async for event in answer["response"]]

        async def cancelled(client, endpoint):
            for pause in (0, 0.1):  # before it has begun, and while the worker is busy
                request = endpoint.request("/work", {})
                await asyncio.sleep(pause)
                request.cancel()
                with self.assertRaises(asyncio.CancelledError):
                    await request
                self.assertEqual(request.status, "Cancelled")
            await self.hung_up()

        async def waited_for(client, endpoint):
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(endpoint.request("/work", {}), 0.1)
            await self.hung_up()

        async def closed_under_way(client, endpoint):
            request = endpoint.request("/work", {})
            await asyncio.sleep(0.1)
            await client.close()
            await self.hung_up()
            self.assertTrue(request.cancelled())

        async def closed_under_a_coroutine(client, endpoint):
            client = vastai.CoroutineServerless(KEY, autoscaler_url=self.server.url)
            self.server.requests = []
            task = asyncio.ensure_future(client.queue_endpoint_request(endpoint, "/work", {}))
            while not self.sent("/work"):
                await asyncio.sleep(0.01)
            await client.close()
            with self.assertRaises(RuntimeError) as caught:
                await asyncio.wait_for(task, 4)
            self.assertIsInstance(caught.exception, vastai.OutcomeUnknownError)
            await self.hung_up()

        for program in (closed, forgotten, never_read, left):
            self.worker = [until_gone(chunked(event(1), end=False))]
            self.program(program, connection_limit=1)
        for program in (cancelled, waited_for, closed_under_way, closed_under_a_coroutine):
            self.worker = [until_gone(b"")]
            self.program(program)

    async def hung_up(self):
        self.assertTrue(await asyncio.get_running_loop().run_in_executor(None, self.server.gone.wait, 2))
        self.server.gone.clear()


class TestServerless(ServerlessCase):
    """The classes around the requests."""

    def test_endpoints(self):
        async def program(client, endpoint):
            found = await client.get_endpoint("tests")
            with self.assertRaisesRegex(Exception, "no endpoint 'others'"):
                await client.get_endpoint("others")
            return repr(found), found.data.config.max_workers, client.is_open()
        self.assertEqual(self.program(program), ("<Endpoint tests (id=321)>", 4, True))

    def test_old_endpoint(self):
        """The key of an endpoint that was fetched long ago is fetched again."""
        async def program(client, endpoint):
            for _ in range(2):
                old = vastai.Endpoint(client, "old", 321, "old-key")
                old.last_refresh -= 7 * 86_400
                await old.request("/work", {})
        self.program(program)
        self.assertEqual({request["headers"]["authorization"] for request in self.sent("/route/")}, {"Bearer renewed-key"})

    def test_old_endpoint_and_silent_console(self):
        self.server.route = lambda request: stall if request["path"].startswith("/api/") else self.step(request)
        grant = {"url": self.server.url}

        async def program(client, endpoint):
            old = vastai.Endpoint(client, "old", 321, "old-key", None, 1, 2)
            old.last_refresh -= 3
            with self.assertRaises(asyncio.TimeoutError):
                await old.request("/work", {}, timeout=0.2)
            request = old.request("/work", {})
            await asyncio.sleep(0.1)
            request.cancel()
            await asyncio.wait([request])
            await asyncio.sleep(0)
            session = vastai.Session(old, "s-1", 60, None, self.server.url, grant)
            await session.request("/work", {})  # needs no key
            return request.status
        self.assertEqual(self.program(program), "Cancelled")
        self.assertEqual(self.sent("/route/"), [])

    def test_used_future(self):
        """A request that is over would give the old answer for a job that was never sent."""
        async def program(client, endpoint):
            used = vastai.ServerlessRequest()
            await endpoint.request("/work", {}, used)
            with self.assertRaisesRegex(vastai.UsageError, "not been used"):
                endpoint.request("/work", {}, used)
            return used.status
        self.assertEqual(self.program(program), "Complete")

    def test_request_replaced(self):
        """Programs put a function with names of its own order in the place of the client's."""
        async def program(client, endpoint):
            def queue(endpoint, worker_route, worker_payload, *, cost, **others):
                return [endpoint.name, worker_route, worker_payload, cost, others["retry"]]
            client.queue_endpoint_request = queue
            return endpoint.request("/work", {"a": 1}, cost=7, retry=False)
        self.assertEqual(self.program(program), ["tests", "/work", {"a": 1}, 7, False])

    def test_pickled_errors(self):
        """They come out of a pool of processes as what they are."""
        for router, kind, limit in (([reply("no", 404)], RuntimeError, None),
                                    ([{"url": "http://127.0.0.1:1"}], asyncio.TimeoutError, 0.5)):
            self.router = router
            error = self.error(self.ask, timeout=limit)
            again = pickle.loads(pickle.dumps(error))
            self.assertIsInstance(again, kind)
            self.assertIsInstance(again, error.family)
            self.assertEqual(str(again), str(error))

    def test_future(self):
        seen, told = [], io.StringIO()

        async def program(client, endpoint):
            tracker = vastai.RequestStatus()
            request = endpoint.request("/work", {}, serverless_request=tracker)
            self.assertIsInstance(request, vastai.ServerlessRequest)
            self.assertTrue(asyncio.isfuture(request))
            self.assertIs(request.then(seen.append), request)
            self.assertEqual(request.status, "New")
            request.status, request.req_idx = "Mine", 9
            self.assertEqual((tracker.status, tracker.req_idx), ("Mine", 9))
            await request
            self.router = [reply("no", 404)]
            failed = endpoint.request("/work", {}).then(seen.append)
            with contextlib.redirect_stdout(told):
                await asyncio.wait([failed])
            return tracker.status, failed.status, tracker.complete_time >= tracker.start_time >= tracker.create_time
        self.assertEqual(self.program(program), ("Complete", "Errored", True))
        self.assertEqual([answer["response"] for answer in seen], [{"n": 1}])
        self.assertIn("HTTP 404 - no", told.getvalue())

    def test_more_than_connections(self):
        """More jobs than connections wait, and a wait does not count as the router's time."""
        def slowly(faulty, sock, request):
            time.sleep(0.02)
            sock.sendall(reply({"n": 1}))
            return True
        self.worker = [slowly]

        async def program(client, endpoint):
            answers = await asyncio.gather(*(endpoint.request("/work", {}) for _ in range(12)))
            self.assertLessEqual(self.server.connections, 2)
            self.worker = [stall]
            waiting = [endpoint.request("/work", {}, timeout=0.2) for _ in range(4)]
            failed = await asyncio.gather(*waiting, return_exceptions=True)
            return [answer["ok"] for answer in answers], {type(error).__name__ for error in failed}
        self.assertEqual(self.program(program, connection_limit=2), ([True] * 12, {"TimeoutError"}))
        self.worker = [reply({"n": 1})]
        self.assertTrue(self.program(lambda client, endpoint: endpoint.request("/work", {}), connection_limit=0)["ok"])

    def test_two_loops(self):
        client = vastai.Serverless(KEY, autoscaler_url=self.server.url)
        endpoint = vastai.Endpoint(client, "tests", 321, ENDPOINT_KEY)

        async def once():
            return (await endpoint.request("/work", {}))["ok"], client.is_open()
        self.assertFalse(client.is_open())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            for _ in range(3):
                self.assertEqual(asyncio.run(once()), (True, True))
            asyncio.run(client.close())
            self.assertFalse(client.is_open())
            gc.collect()  # the sockets of loops that ended without closing the client

    def test_loops_of_other_threads(self):
        """Another thread may begin to use the client while this one looks for loops that are closed."""
        async def once():
            client.streams()

        class Loop(asyncio.SelectorEventLoop):
            def is_closed(self):
                if others:
                    thread = threading.Thread(target=asyncio.run, args=(others.pop(),))
                    thread.start()
                    thread.join()
                return super().is_closed()
        client, others, loop = vastai.Serverless(KEY), [], Loop()
        loop.run_until_complete(once())
        others.append(once())
        asyncio.run(once())
        loop.close()

    def test_other_loops(self):
        """close() ends also what runs in the loops of other threads, and passes over a loop that is closed."""
        self.worker = [lambda faulty, sock, request: faulty.over.wait(30)]
        ended = threading.Event()

        async def begin():
            request = endpoint.request("/work", {})
            while not self.sent("/work"):
                await asyncio.sleep(0.01)
            return request

        async def whole():
            await asyncio.wait([await begin()])
            ended.set()

        def close():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                asyncio.run(client.close())
                gc.collect()
        client = vastai.Serverless(KEY, autoscaler_url=self.server.url)
        endpoint = vastai.Endpoint(client, "tests", 321, ENDPOINT_KEY)
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda loop, context: None)  # "Task was destroyed but it is pending!"
        loop.run_until_complete(begin())
        loop.close()
        close()
        self.server.requests = []
        threading.Thread(target=asyncio.run, args=(whole(),), daemon=True).start()
        while not self.sent("/work"):
            time.sleep(0.01)
        time.sleep(0.1)  # until nothing but the answer wakes that loop
        close()
        self.assertTrue(ended.wait(60))

    def test_time_in_a_task_that_was_cancelled(self):
        """A task that has survived a cancellation learns that its time is over by TimeoutError."""
        self.worker = [stall]

        async def stubborn(endpoint):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(9)
            await endpoint.request("/work", {}, timeout=0.2)

        async def program(client, endpoint):
            task = asyncio.ensure_future(stubborn(endpoint))
            await asyncio.sleep(0)
            task.cancel()
            await task
        self.assertIsInstance(self.error(self.program, program, "CoroutineServerless"), asyncio.TimeoutError)

    def test_hosts_with_several_addresses(self):
        """One that does not answer does not keep the client from the next."""
        with contextlib.ExitStack() as stack:
            deaf, *waiting = [stack.enter_context(socket.socket()) for _ in range(5)]
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            for sock in waiting:  # its queue is full, so it answers nobody
                sock.setblocking(False)
                sock.connect_ex(deaf.getsockname())
            found = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))
                     for port in (deaf.getsockname()[1], self.server.port)]

            async def program(client, endpoint):
                client.autoscaler_url = "http://router.example"
                with mock.patch("socket.getaddrinfo", lambda *_, **__: found):
                    return await endpoint.request("/work", {}, timeout=5)
            self.assertTrue(self.program(program)["ok"])

    def test_long_pauses(self):
        """A service that asks for more than a minute is not waited for."""
        self.server.route = lambda request: reply("slow down", 429, Retry_After="3600")
        error = self.error(self.program, lambda client, endpoint: client.get_endpoints())
        self.assertEqual((error.retry_after, len(self.server.requests)), (3600, 1))

    def test_keys(self):
        with self.assertRaisesRegex(AttributeError, "API key"):
            vastai.Serverless()
        os.makedirs(os.path.join(self.home, ".config", "vastai"))
        with open(os.path.join(self.home, ".config", "vastai", "vast_api_key"), "w") as file:
            file.write("key-of-a-file")
        self.assertEqual(vastai.CoroutineServerless().api_key, "key-of-a-file")
        with mock.patch.dict(os.environ, VAST_API_KEY=KEY):
            self.assertEqual(vastai.Serverless().api_key, KEY)

        async def program(client, endpoint):
            return await vastai.Endpoint(client, "tests", 321, "a\r\nb: c").request("/work", {}, timeout=0.1)
        self.error(self.program, program)
        self.assertEqual(self.server.requests, [])

    def test_creations_are_not_repeated(self):
        """Nor do they go over a connection that may be closed meanwhile."""
        self.server.route = lambda request: hang_up if request["method"] == "POST" else self.step(request)

        async def program(client, endpoint):
            await client.get_endpoints()
            await client.create_endpoint(vastai.EndpointConfig("new"))
        self.assertIsInstance(self.error(self.program, program), vastai.OutcomeUnknownError)
        self.assertEqual((len(self.server.requests), self.server.connections), (2, 2))
        for answer in (reply("bad gateway", 502), reply("<html>")):  # nor are these a refusal
            self.server.route = lambda request, answer=answer: answer if request["method"] == "POST" else self.step(request)
            self.assertIsInstance(self.error(self.program, program), vastai.OutcomeUnknownError)

    def test_ids_that_are_none(self):
        for wrong in (None, "", "7/../8"):
            self.assertIsInstance(self.error(self.program, lambda client, endpoint, wrong=wrong: client.delete_endpoint(wrong)),
                                  vastai.UsageError)
        self.assertEqual(self.server.requests, [])

    def test_refusals_with_status_200(self):
        for told in ({"success": "false"}, {"error": "no such endpoint"}, {"status": "error", "msg": "no"}):
            self.server.route = lambda request, told=told: reply(told)
            error = self.error(self.program, lambda client, endpoint: client.delete_endpoint(7))
            self.assertEqual(error.body, told)
        self.server.route = lambda request: reply({"success": True})  # nor is this an account without workergroups
        self.assertIn("results", str(self.error(self.program, lambda client, endpoint:
                                                client.find_workergroup_for_endpoint(7))))

    def test_workers(self):
        told = {"error": "slow down", "more": "\u2028" * 2000}
        answers = [reply([{"id": 5, "status": None, "perf": "1.5", "cur_load": 2}]), reply({"error_msg": "not ready"}),
                   reply(json.dumps(told, indent=1), 429)]
        self.server.route = lambda request: answers.pop(0)

        async def program(client, endpoint):
            workers = [await endpoint.get_workers() for _ in range(2)]
            with self.assertRaisesRegex(RuntimeError, 'HTTP 429 - {"error": "slow down"') as caught:
                await vastai.Endpoint(client, "chat - 8b", 321, ENDPOINT_KEY).get_workers()
            self.assertEqual(json.loads(str(caught.exception).split(" - ", 1)[1]), told)
            with self.assertRaises(ValueError):
                await client.get_endpoint_workers("tests")
            return workers
        (worker,), none = self.program(program)
        self.assertEqual((worker.id, worker.status, worker.perf, worker.reqs_working, none), (5, "UNKNOWN", 1.5, 0, []))
        self.assertRegex(repr(worker), r"^Worker\(id=5, status='UNKNOWN', cur_load=2\.0, ")

    def test_as_the_official_client(self):
        """What programs of the official client call and read besides."""
        async def program(client, endpoint):
            tracker = vastai.RequestStatus()
            queued = client.queue_endpoint_request(endpoint, "/work", {}, None, tracker, 7, 30, 20, False, 2, False)
            self.assertEqual((await queued)["response"], {"n": 1})
            self.assertEqual(tracker.status, "Complete")
            (found,) = await client.get_endpoints()
            self.assertEqual((found.data.auto_delete_in_seconds, found.data.auto_delete_due_24h), (None, False))
            managed = vastai.ManagedEndpoint(321, client)
            for shown in ("loaded", "lazy"):
                await managed.request("/work", {}) if shown == "loaded" else managed.invalidate()
                self.assertEqual(repr(managed), f"<ManagedEndpoint id=321 ({shown})>")
            self.server.route = lambda request: reply("", 204)
            await managed.delete()
            return client.VAST_WEB_URL
        self.assertEqual(self.program(program), "https://console.vast.ai")
        self.assertEqual(json.loads(self.sent("/route/")[0]["body"])["cost"], 7)
        self.assertIs(vastai.Endpoint_, vastai.Endpoint)
        self.assertEqual(vastai.EndpointConfig("a", max_workers=2).to_dict(), {"endpoint_name": "a", "max_workers": 2})


class TestServerlessSessions(ServerlessCase):
    MADE = reply({"session_id": "s-1", "expiration": 1.9e9}, 201)

    def test_session(self):
        self.worker = [self.MADE, reply({"n": 1}), reply({"ended": True})]

        async def program(client, endpoint):
            async with await endpoint.session(lifetime=30) as session:
                answer = await session.request("/work", {})
            with self.assertRaises(ValueError):
                session.request("/work", {})
            return answer["ok"], session.open
        self.assertEqual(self.program(program), (True, False))
        self.assertEqual(json.loads(self.sent("/work")[0]["body"])["session_id"], "s-1")
        self.assertEqual((len(self.sent("/route/")), len(self.sent("/session/end"))), (1, 1))

    def test_end_is_sent_once(self):
        self.worker = [self.MADE, hang_up]

        async def program(client, endpoint):
            session = await endpoint.session()
            await session.close()
            return session.open
        self.assertFalse(self.program(program))
        self.assertEqual(len(self.sent("/session/end")), 1)

    def test_requests_begin_when_awaited(self):
        self.worker = [self.MADE, reply({"n": 1})]

        async def program(client, endpoint):
            session = await endpoint.session()
            never = session.request("/never", {})
            task = asyncio.ensure_future(session.request("/never", {}))
            task.cancel()
            await session.request("/work", {})
            never.close()
            return task.cancelled()
        self.assertTrue(self.program(program))
        self.assertEqual(self.sent("/never"), [])

    def test_made_by_hand(self):
        """Its worker is the one at `url`, whatever the grant says."""
        grant = {"url": "http://127.0.0.1:1"}

        async def program(client, endpoint):
            for values in ((None, "s-1", "url"), (endpoint, None, "url"), (endpoint, "s-1", None)):
                with self.assertRaises(ValueError):
                    vastai.Session(*values[:2], 60, None, values[2], grant)
            session = vastai.Session(endpoint, "s-1", 60, None, self.server.url, grant, "/bye", {"a": 1})
            self.assertEqual((session.on_close_route, session.on_close_payload), ("/bye", {"a": 1}))
            await session.request("/work", {})
            await session.close()
        self.program(program)
        self.assertEqual(json.loads(self.sent("/work")[0]["body"])["auth_data"], grant)
        self.assertEqual(len(self.sent("/session/end")), 1)

    def test_found_without_a_worker(self):
        for found in ({}, {"auth_data": None}, {"auth_data": {"cost": 1}}):
            self.worker = [reply(found)]
            error = self.error(self.program, lambda client, endpoint: endpoint.get_session("s-1", {"url": self.server.url}))
            self.assertIn("auth_data", str(error))

    def test_endings(self):
        for step, kind in ((reply({"error": "gone"}, 410), ValueError), (hang_up, ConnectionError)):
            self.worker, self.server.requests = [self.MADE, step], []

            async def program(client, endpoint, kind=kind):
                session = await endpoint.session()
                with self.assertRaises(kind):
                    await session.request("/work", {})
                return session.open
            self.assertFalse(self.program(program))
            self.assertEqual(len(self.sent("/work")), 1)

    def test_waiting_for_a_connection(self):
        """That no connection was free in time says nothing about the session."""
        self.worker = [self.MADE, stall]

        async def program(client, endpoint):
            session = await endpoint.session()
            other = endpoint.request("/work", {})
            while not self.sent("/work"):
                await asyncio.sleep(0.01)
            with self.assertRaises(asyncio.TimeoutError):
                await session.request("/work", {}, timeout=0.2)
            with self.assertRaises(asyncio.TimeoutError):
                await endpoint.get_session("s-1", {"url": self.server.url}, timeout=0.2)
            self.assertEqual(self.sent("/session/get"), [])
            other.cancel()
            return session.open
        self.assertTrue(self.program(program, connection_limit=1))

    def test_is_open(self):
        for step, state in ((reply({"auth_data": {}}), True), (reply({"error": "no session"}, 400), False), (hang_up, False)):
            self.worker = [self.MADE, step]

            async def program(client, endpoint):
                return await (await endpoint.session()).is_open()
            self.assertEqual(self.program(program), state)
        self.worker = [self.MADE, reply("busy", 503), reply({})]

        async def program(client, endpoint):
            async with await endpoint.session() as session:
                with self.assertRaisesRegex(Exception, "HTTP 503"):
                    await session.is_open()
        self.program(program)
        self.assertEqual(len(self.sent("/session/end")), 1)


class TestServerlessTls(ServerlessCase):
    """Workers' certificates are signed by Vast.ai's root, which is fetched, cached, and trusted for workers alone."""

    def setUp(self):
        super().setUp()
        self.far = self.serve(reply({"n": 2}), tls=server_context(self.home))
        self.worker_url = self.far.url
        self.cache = vastai.root_file(self.server.url + "/static/root.cer")

    def fetched(self):
        return len(self.sent("/static/root.cer"))

    def test_fetched_once(self):
        async def program(client, endpoint):
            return [answer["response"] for answer in await asyncio.gather(
                *(endpoint.request("/work", {}) for _ in range(5)))]
        self.assertEqual(self.program(program, connection_limit=1), [{"n": 2}] * 5)
        self.assertEqual(self.program(program), [{"n": 2}] * 5)
        vastai._roots.clear()  # as in another process
        self.assertEqual(self.program(program), [{"n": 2}] * 5)
        self.assertEqual(self.fetched(), 1)
        os.utime(self.cache, (time.time() - 90_000,) * 2)
        vastai._roots.clear()
        self.program(program)
        self.assertEqual(self.fetched(), 2)

    def test_renewed(self):
        """A root that was cached and does not fit, or is broken, is fetched again."""
        system = ssl.create_default_context().get_ca_certs(binary_form=True)
        old = ssl.DER_cert_to_PEM_cert(system[0]) if system else "broken"
        for text in (old, "broken"):
            os.makedirs(os.path.dirname(self.cache), exist_ok=True)
            with open(self.cache, "w") as file:
                file.write(text)
            os.utime(self.cache, (time.time() - 600,) * 2)
            vastai._roots.clear()
            self.assertEqual(self.ask(max_retries=1)["response"], {"n": 2})
        self.assertEqual(self.fetched(), 2)

    def test_closed_while_it_is_read(self):
        """A stream that has come whole ends well, although the worker closes before its last event is read."""
        self.far.route = lambda request: cut(chunked(event(1), event(2)))

        async def program(client, endpoint):
            found = []
            async for value in (await endpoint.request("/work", {}, stream=True))["response"]:
                (used,) = client.streams().used
                while not used.reader._eof:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                found.append(value)
            return found
        self.assertEqual(self.program(program), [1, 2])

    def test_left_with_much_to_read(self):
        """The end of a stream whose client was closed is told as that, however much of it had come."""
        self.far.route = lambda request: chunked(*[event("x" * 60_000)] * 20, end=False)

        async def program(client, endpoint):
            events = (await endpoint.request("/work", {}, stream=True))["response"]
            (used,) = client.streams().used
            while not used.reader._paused:
                await asyncio.sleep(0.01)
            await client.close()
            with self.assertRaises(ConnectionError):
                [value async for value in events]
        self.program(program)

    def test_reset_while_it_is_idle(self):
        """A kept connection that the worker resets costs no job."""
        reset_now, gone = threading.Event(), threading.Event()

        def once(faulty, sock, request):
            sock.sendall(reply({"n": 2}))
            reset_now.wait(5)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(sock.detach())
            gone.set()
        self.far.route = lambda request: once

        async def program(client, endpoint):
            await endpoint.request("/work", {}, retry=False)
            reset_now.set()
            while not gone.is_set():
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            return (await endpoint.request("/work", {}, retry=False))["response"]
        self.assertEqual(self.program(program), {"n": 2})

    def test_strangers(self):
        self.server.route = lambda request: (reply("nothing here", 404) if request["path"].startswith("/static")
                                             else self.step(request))
        self.assertIn("root certificate", str(self.error(self.ask, max_retries=1)))
        for text in ("", "<html>ž</html>", b"\x30\x82\x05"):
            self.server.route = lambda request, text=text: (reply(text) if request["path"].startswith("/static")
                                                            else self.step(request))
            self.assertIn("root certificate", str(self.error(self.ask, max_retries=1)))
        for url in (self.far.url.replace("127.0.0.1", "localhost"), "https://127.0.0.1:1"):
            self.worker_url = url
            self.error(self.ask, max_retries=1)
        self.assertEqual(self.far.requests, [])
        self.server.url = self.far.url  # a router with that certificate is none
        self.assertIn("certificate", str(self.error(self.ask)))
        self.assertEqual(self.far.requests, [])

    def test_proxies(self):
        proxy = TestProxies.proxy(self)
        address = f"http://user:pass%2Fword@127.0.0.1:{proxy.port}"
        with mock.patch.dict(os.environ, HTTPS_PROXY=address):
            self.assertEqual(self.ask()["response"], {"n": 2})
        self.assertEqual([request["target"] for request in proxy.requests], [f"127.0.0.1:{self.far.port}"])
        with mock.patch.dict(os.environ, HTTP_PROXY=address):
            self.error(self.ask, timeout=0.5)
        self.assertEqual(proxy.requests[-1]["target"], self.server.url + "/route/")
        vastai._roots.clear()
        os.unlink(self.cache)
        with mock.patch.dict(os.environ, HTTPS_PROXY="socks5://127.0.0.1:1"):
            self.assertIn("SOCKS", str(self.error(self.ask, timeout=5)))

    def test_silent_proxy(self):
        """The program's end does not wait for a proxy longer than the request did."""
        proxy = self.serve(lambda faulty, sock, request: faulty.over.wait(30))
        started = time.monotonic()
        with mock.patch.dict(os.environ, HTTPS_PROXY=proxy.url):
            self.assertIsInstance(self.error(self.ask, timeout=0.5), vastai.WaitTimeoutError)
        self.assertLess(time.monotonic() - started, 15)


class TestRequest(ServerlessCase):
    """`VastAI().request(...)` and `vastai request`: the same rules over the module's own transport."""

    JSON = reply({"n": 1}, Content_Type="application/json")

    def setUp(self):
        super().setUp()
        patch = mock.patch("time.sleep")  # the pauses between tries
        patch.start()
        self.addCleanup(patch.stop)

    def ask(self, **options):
        return self.client(self.server).request("tests", "/work", {"a": 1}, **options)

    def tell(self, *words):
        self.server.requests = []
        status, out, err = self.run_here(self.server, "request", "tests", "/work", *words)
        self.assertNotIn(ENDPOINT_KEY, out + err)
        return status, out, err

    def test_lost(self):
        for loss in TestJobs.LOSSES:
            self.worker, self.server.requests = [loss], []
            self.assertIsInstance(self.error(self.ask, retry=False), vastai.OutcomeUnknownError)
            self.assertEqual(len(self.sent("/work")), 1)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.worker, self.server.requests = [*TestJobs.LOSSES, self.JSON], []
            self.assertEqual(self.ask(), {"n": 1})
        self.assertEqual((len(self.sent("/work")), len(told)), (len(TestJobs.LOSSES) + 1, len(TestJobs.LOSSES)))

    def test_statuses(self):
        for step, words, status, tries in (
                (hang_up, ["--no-retry"], 7, 1), (hang_up, ["--max-retries", "3"], 7, 3), (stall, ["--timeout", "0.2"], 7, 1),
                (stall, ["--worker-timeout", "0.2", "--no-retry"], 7, 1), (reply("{no", Content_Type="application/json"), [], 1, 1),
                (reply("no", 400), [], 1, 1), (reply("boom", 500), ["--max-retries", "2"], 1, 2), (reply("no", 401), [], 3, 1),
                (reply("no", 403), [], 3, 1), (reply("no", 404), [], 4, 1), (reply("no", 410), [], 4, 1),
                (reply("busy", 429), ["--no-retry"], 5, 1)):
            self.worker = [step]
            with self.subTest(status=status, words=words):
                told, out, err = self.tell(*words)
                self.assertEqual((told, out, len(self.sent("/work"))), (status, "", tries), err)
        self.router = [reply(WAITING)]
        self.assertEqual(self.tell("--timeout", "0.2")[0], 9)
        self.server.route = lambda request: stall
        self.assertEqual(self.tell("--timeout", "0.2")[0], 9)
        self.server.route = self.step
        self.worker_url, self.router = "http://127.0.0.1:1", [{}]
        self.assertEqual(self.tell("--no-retry")[0], 6)

    def test_what_is_wrong(self):
        for words, status in ((["--json", "[1]"], 2), (["--json", "{}", "-"], 2), (["-"], 2), (["--raw", "--out", "x"], 2),
                              (["--raw", "--text"], 2)):
            self.assertEqual(self.tell(*words)[0], status)
        self.assertEqual(self.run_here(self.server, "request", "others", "/work")[0], 4)
        self.assertEqual(self.sent("/work"), [])

    def test_what_is_sent(self):
        file = os.path.join(self.home, "payload.json")
        with open(file, "w") as target:
            target.write('{"a": "ž"}')
        for words, stdin in ((["--json", '{"a": "ž"}'], ""), (["--file", file], ""), (["-"], '{"a": "ž"}')):
            self.server.requests = []
            self.assertEqual(self.run_here(self.server, "request", "321", "work", *words, "--cost", "8", stdin=stdin)[0], 0)
            (route,), (job,) = self.sent("/route/"), self.sent("/work")
            self.assertEqual((json.loads(job["body"])["payload"], json.loads(route["body"])["cost"]), ({"a": "ž"}, 8))
            self.assertEqual(route["headers"]["authorization"], f"Bearer {ENDPOINT_KEY}")
            self.assertNotIn("authorization", job["headers"])

    def test_stdin(self):
        """It is UTF-8 with or without a byte-order mark, whatever the terminal's encoding."""
        for mark in (b"", codecs.BOM_UTF8):
            self.server.requests = []
            with tempfile.TemporaryFile() as file:
                file.write(mark + '{"a": "ž"}'.encode())
                file.seek(0)
                ended = self.run_process("request", "321", "work", "-", "--url", self.server.url, stdin=file,
                                         env={"PYTHONIOENCODING": "cp1252"})
            self.assertEqual(ended.returncode, 0, ended.stderr)
            (job,) = self.sent("/work")
            self.assertEqual(json.loads(job["body"])["payload"], {"a": "ž"})

    def test_shapes(self):
        chat = {"choices": [{"message": {"content": "Hello"}}]}
        events = [{"choices": [{"delta": {"content": text}}]} for text in ("Hel", "lo")]
        for step, words, out in (
                (self.JSON, [], '{\n "n": 1\n}\n'), (reply("plain", Content_Type="text/plain"), [], "plain\n"),
                (reply(chat), ["--text"], "Hello\n"), (reply({"choices": [{"text": "Paris"}]}), ["--text"], "Paris\n"),
                (self.JSON, ["--text"], '{\n "n": 1\n}\n'),  # no model's answer: it is not lost
                (chunked(*map(event, events)), ["--stream"], "".join(json.dumps(value) + "\n" for value in events)),
                (chunked(*map(event, events)), ["--stream", "--text"], "Hello\n"),
                (chunked(event(1), b"data: [DONE]\n\n"), ["--stream", "--raw"], "[\n 1\n]\n"),
                (reply([{"a": 1}, {"a": 2}]), ["--format", "jsonl"], '{"a": 1}\n{"a": 2}\n'),
                (reply([1, {"a": 2}]), ["--format", "jsonl"], '{"response": 1}\n{"a": 2}\n'),
                (reply("null"), ["--format", "csv"], 'response\n""\n'), (reply("null"), ["--raw"], "null\n"),
                (reply(b"\x00\xff", Content_Type="image/png"), ["--format", "tsv"], "response\nAP8=\n"),
                (reply(""), [], "null\n"), (reply({"id": 1}), ["--quiet"], '{\n "id": 1\n}\n'),
                (reply(b"\x00\xff", Content_Type="image/png"), ["--raw"], '"AP8="\n')):
            self.worker = [step]
            self.assertEqual(self.tell(*words), (0, out, ""))
        self.worker = [reply(b'{"a": NaN}')]
        for words in (["--raw"], ["--format", "jsonl"]):
            status, out, err = self.tell(*words)
            self.assertEqual((status, out), (1, ""))
            self.assertIn("NaN", err)

    def test_media(self):
        media = b"\x89PNG\xff\x00"
        self.worker = [reply(media, Content_Type="image/png")]
        self.assertEqual(self.ask(), media)
        self.assertEqual(vastai.free_name("/", "png"), "response-1.png")
        path = os.path.join(self.home, "a.png")
        status, out, err = self.tell("--out", path)
        with open(path, "rb") as file:
            self.assertEqual((status, out, file.read()), (0, "", media))
        self.assertIn("6 bytes", err)
        process = self.start_process("request", "tests", "/work", "--url", self.server.url, "--api-key", KEY)
        self.assertEqual(process.communicate(timeout=60)[0], media)
        if os.name == "posix":
            with Terminal([sys.executable, compiled(), "request", "tests", "/work", "--url", self.server.url, "--api-key", KEY],
                          dict(os.environ)) as terminal:
                terminal.expect("Saved 6 bytes to work-1.png")
                self.addCleanup(os.unlink, "work-1.png")
                self.assertEqual(terminal.status(), 0)
            with open("work-1.png", "rb") as file:
                self.assertEqual(file.read(), media)

    def test_half_characters(self):
        """A file gets their escapes, as stdout does."""
        path = os.path.join(self.home, "events")
        self.worker = [chunked(event({"a": "\ud800"}))]
        self.assertEqual(self.tell("--stream", "--out", path)[0], 0)
        with open(path, encoding="ascii") as file:
            self.assertEqual(json.loads(file.read()), {"a": "\ud800"})

    def test_endpoint_without_a_key(self):
        """The service refuses it, not we."""
        found = {"success": True, "results": [dict(ENDPOINT, api_key=None)]}
        self.server.route = lambda request: reply(found) if request["path"].startswith("/api/") else reply("no key", 401)
        status, out, err = self.tell()
        self.assertEqual((status, out, "no key" in err), (3, "", True))

    def test_files(self):
        """What fails after the job is not wrong use."""
        for step, words, status in ((self.JSON, [], 1 if os.path.exists("/dev/full") else 0),
                                    (cut(chunked(event(1), end=False)), ["--stream"], 7)):
            self.worker = [step]
            self.assertEqual(self.tell("--out", "/dev/full" if status == 1 else os.path.join(self.home, "out"), *words)[0],
                             status)

    def test_events_as_they_come(self):
        """Each event is printed when it comes; Ctrl-C closes the worker's connection."""
        self.worker = [until_gone(chunked(event(1), event(2), end=False))]
        for words in ([], ["--format", "jsonl"]):
            self.server.gone.clear()
            process = self.start_process("request", "tests", "/work", "--stream", "--url", self.server.url, "--api-key", KEY,
                                         *words)
            self.assertEqual([process.stdout.readline() for _ in range(2)], [b"1\n", b"2\n"])
            process.send_signal(signal.SIGINT)
            self.assertTrue(self.server.gone.wait(60))
            self.assertEqual((process.wait(60), process.stdout.read(), process.stderr.read()), (130, b"", b""))
            process.stdout.close()
            process.stderr.close()

    def test_events_that_end_early(self):
        self.worker = [cut(chunked(event(1), end=False))]
        status, out, err = self.tell("--stream")
        self.assertEqual((status, out), (7, "1\n"))
        self.assertRegex(err, r"\Arequest: the worker's stream ended early [^\n]*\n\Z")

    def test_events_in_the_sdk(self):
        self.worker = [chunked(*map(event, EVENTS))]
        self.assertEqual(list(self.ask(stream=True)), EVENTS)
        self.worker = [until_gone(chunked(event(1), end=False))]
        events = self.ask(stream=True)
        self.assertEqual(next(events), 1)
        events.close()
        self.assertTrue(self.server.gone.wait(60))
        self.server.gone.clear()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", ResourceWarning)
            vastai.VastAI(KEY, self.server.url).request("tests", "/work", {}, stream=True)  # and never read
            gc.collect()
        self.assertNotIn("raddr", str([str(warning.message) for warning in told]))
        self.assertTrue(self.server.gone.wait(60))
        self.server.gone.clear()
        self.worker, now = [in_two_parts(chunked(event(1), event(2)))], time.monotonic
        events = self.ask(stream=True, timeout=5)
        with mock.patch("time.monotonic", lambda: now() + 9):
            self.assertEqual(next(events), 1)
            self.server.gone.set()
            self.assertEqual(list(events), [2])
        for step, options in ((cut(chunked(event(1), end=False)), {}), (stuck(chunked(event(1), end=False)), {"worker_timeout": 0.2}),
                              (stuck(chunked(end=False)), {"timeout": 0.2})):
            self.worker = [step]
            self.assertIsInstance(self.error(lambda options=options: list(self.ask(stream=True, **options))),
                                  vastai.OutcomeUnknownError)

    def test_explained(self):
        status, out, err = self.tell("--explain")
        self.assertEqual((status, err.count("POST "), err.count("Bearer ***")), (0, 2, 2))
        status, out, err = self.tell("--curl")
        self.assertEqual((status, out.count("curl"), self.server.requests), (0, 1, []))

    def test_connections_to_workers(self):
        """A job goes over a connection of its own, which is closed behind it."""
        worker = self.serve(self.JSON)
        self.worker_url, client = worker.url, self.client(self.server)
        for _ in range(2):
            client.request("tests", "/work", {})
        self.assertEqual([place.port for place, idle in client.pool.idle.items() if idle], [self.server.port])

    def test_certificates(self):
        far = self.serve(reply({"n": 2}), tls=server_context(self.home))
        self.worker_url = far.url
        self.assertEqual([self.ask() for _ in range(3)], [{"n": 2}] * 3)
        self.assertEqual(len(self.sent("/static/jvastai_root.cer")), 1)
        self.worker_url = far.url.replace("127.0.0.1", "localhost")
        self.assertIn("certificate", str(self.error(self.ask, max_retries=1)))


class TestServerlessNames(unittest.TestCase):
    def run_python(self, program):
        done = subprocess.run([sys.executable, "-S", "-c", program], cwd=HERE, capture_output=True, text=True, timeout=20)
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    def test_asyncio_is_loaded_late(self):
        self.assertEqual(self.run_python("import sys, vastai; vastai.Serverless('key-of-nobody').api_key; "
                                         "vastai.RequestStatus(); print('asyncio' in sys.modules, 'dataclasses' in sys.modules)"),
                         "False False")

    def test_modules_of_the_official_package(self):
        self.assertEqual(self.run_python("""
from vastai.serverless.client.client import Serverless, ServerlessRequest
from vastai.serverless.client.endpoint import Endpoint
from vastai.serverless.client.session import Session
from vastai.serverless.client.request_status import RequestStatus
from vastai.data.endpoint import EndpointConfig
import vastai.serverless
print(vastai.serverless.client.client.Serverless is Serverless, issubclass(ServerlessRequest, __import__('asyncio').Future))
"""), "True True")

    def test_names_that_are_not_here(self):
        for name in ("Worker", "WorkerConfig", "HandlerConfig", "LogActionConfig", "BenchmarkConfig", "Deployment", "SyncClient",
                     "AsyncClient"):
            self.assertRegex(self.run_python(f"from vastai import VastAI, {name}"), f"^ImportError: cannot import '{name}': .{{50}}")
            self.assertFalse(hasattr(vastai, name))

    def test_records(self):
        status = vastai.RequestStatus("Queued", start_time=2)
        self.assertEqual(status, vastai.RequestStatus("Queued", status.create_time, 2))
        self.assertIn("status='Queued'", repr(status))
        self.assertEqual([field.name for field in dataclasses.fields(status)], list(vars(status)))
        self.assertEqual(dataclasses.asdict(status), vars(status))
        config = vastai.EndpointConfig("a", max_workers=2)
        self.assertEqual(dataclasses.asdict(vastai.EndpointData(1, config, "key"))["config"], vars(config))
        for wrong in (lambda: vastai.RequestStatus(stat=1), lambda: vastai.EndpointConfig(), lambda: vastai.RequestStatus(*range(9))):
            self.assertRaises(TypeError, wrong)


# ------------------------------------------------------------------------ completion and the prompt


class CompleteTest(unittest.TestCase):
    """The one function behind every shell."""

    def words(self, line):
        return [word for word, _ in vastai.complete(line.split(" "))]

    def test_names(self):
        self.assertIn("search", self.words(""))
        self.assertIn("logs", self.words("l"))
        self.assertEqual(len(set(self.words(""))), len(self.words("")))
        self.assertEqual(["offers"], self.words("search o"))
        self.assertEqual(["instance", "instances"], self.words("--raw --url http://x:1 destroy i"))
        self.assertEqual({"instance", "template"}, {"instance", "template"} & set(self.words("update ")))
        for line in ("nonsense ", "nonsense x", "search offers-new", "show instances-v", "-x nonsense y z"):
            self.assertEqual([], self.words(line))
        meanings = dict(vastai.complete(["search", ""]))
        self.assertEqual(vastai.COMMANDS["search offers"].summary, meanings["offers"])

    def test_every_command_is_reached(self):
        for row in vastai.COMMANDS.values():
            if row.face != "sdk":
                words = row.name.split()
                for count in range(len(words)):
                    self.assertIn(words[count], dict(vastai.complete([*words[:count], words[count][:2]])), row.name)
                    self.assertIn(words[count], dict(vastai.complete(["help", *words[:count], ""])), row.name)
                for arg in row.args:
                    flag = arg.flags[-1]
                    if flag.startswith("--") and arg.face != "sdk" and not arg.hidden:
                        self.assertEqual(arg.help, dict(vastai.complete([*words, flag]))[flag], row.name)

    def test_options(self):
        self.assertEqual(["--type", "--timeout"], self.words("search offers --t"))
        self.assertEqual(["--template_hash"], self.words("create instance 7 --templ"))
        self.assertEqual(["--template-hash"], self.words("create instance 7 --template-"))
        self.assertEqual([], self.words("search offers --raw --ra"), "once is enough")
        self.assertNotIn("--disable-bundling", self.words("search offers --"))
        self.assertIn("--raw", self.words("show user "))
        self.assertEqual(["-o"], self.words("search offers -o"))
        self.assertIn("--api-key", self.words("-"))
        self.assertEqual([], self.words("create instance 7 --args --"))
        self.assertEqual([], self.words("create instance -- --"))

    def test_values(self):
        self.assertEqual(["bid"], self.words("search offers --type b"))
        self.assertEqual(["--type=bid"], self.words("search offers --type=b"))
        self.assertEqual(list(vastai.WRITERS), self.words("--format "))
        self.assertEqual(["bash", "zsh", "fish"], self.words("completion "))
        self.assertEqual([], self.words("completion bash x"))
        self.assertEqual([], self.words("search offers --limit "))
        self.assertEqual(["unverified", "deverified"], [word for word in self.words(
            "show instances --verification verified ") if not word.startswith("-")])
        self.assertIn("gpu_name", self.words("search offers num_gpus=1 gpu_n"))
        self.assertIn("dph_total", self.words("search offers -o dp"))

    def test_files(self):
        self.assertEqual([("", "FILE")], vastai.complete(["create", "instance", "7", "--onstart", "a"]))
        self.assertEqual([("--onstart=", "FILE")], vastai.complete(["create", "instance", "7", "--onstart=a"]))
        self.assertEqual([], vastai.complete(["create", "instance", "7", "--image", "a"]))

    def test_help_goes_no_further_than_a_name(self):
        self.assertEqual(["offers"], self.words("help search o"))
        self.assertEqual([], self.words("help search offers "))
        self.assertEqual([], self.words("help search offers --"))

    def test_where_ids_are_due(self):
        due = {row.name for row in vastai.COMMANDS.values() for arg in row.args if arg.kind.completes == "instances"}
        self.assertLessEqual({"show instance", "start instances", "execute", "logs", "ssh", "ssh-url"}, due)
        self.assertFalse({"create instance", "create instances", "launch instance", "show machine"} & due)
        missed = {row.name for row in vastai.COMMANDS.values() if "instance" in row.name and row.face != "sdk"
                  for arg in row.args if arg.name in ("id", "ids") and row.name not in due}
        self.assertEqual({"create instance", "create instances"}, missed)

    def test_no_line_breaks_it(self):
        for line in ("=", "--=", "-", "--", "-- --", "help help ", "help -- ", "--url", "--format=", "--retry x show ",
                     "search offers --order=x=", "repl ", "search offers \0", "ünï 世界"):
            vastai.complete(line.split(" "))
        self.assertTrue(vastai.complete([]))


class CompletionOfIdsTest(ShellCase):
    """Ids come from the service, or from a cache of a minute."""

    def test_ids_and_their_cache(self):
        ids = self.rented()
        before = self.asked()
        found = self.offered("stop", "instance", "")
        self.assertEqual(ids, sorted(found))
        self.assertIn("RTX", found[ids[0]])
        self.assertIn(r"a:b\tc", found[ids[0]])
        self.assertEqual({ids[1]}, set(self.offered("destroy", "instances", ids[0], "")))
        self.assertEqual({ids[0]}, set(self.offered("logs", ids[0])))
        self.assertEqual({}, self.offered("create", "instance", ""))
        self.assertEqual(1, self.asked() - before)
        names = os.listdir(self.cache)
        self.assertEqual(1, len(names))
        path = os.path.join(self.cache, names[0])
        self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
        with open(path) as file:
            self.assertNotIn(self.box.key, file.read() + path)
        self.offered("--api-key", "another-key-5678", "stop", "instance", "")
        self.assertEqual(2, self.asked() - before, "another key, another cache")
        os.utime(path, (time.time() - 61, time.time() - 61))
        self.offered("ssh", "")
        self.assertEqual(3, self.asked() - before, "a minute later")

    def test_failure_is_silent(self):
        self.assertEqual({}, self.offered("stop", "instance", "", VAST_URL="http://127.0.0.1:9"))
        self.assertEqual({}, self.offered("stop", "instance", "", VAST_URL="nonsense"))
        self.assertEqual({}, self.offered("stop", "instance", "", VAST_API_KEY=""))
        self.box.fail("GET /api/v1/instances/", 500)
        self.assertEqual({}, self.offered("stop", "instance", ""))
        self.assertEqual(3, len(self.offered("stop", "instance", "", XDG_CACHE_HOME=os.devnull)))

    def test_labels(self):
        ids = self.rented()
        with vastai.VastAI(api_key=self.box.key, server_url=self.box.url) as client:
            for label in ("run-7.b", "run-7.b", "two words", "77", "$HOME", "-x"):
                id = client.create_instance(id=self.box.offer()["id"], image="i", label=label)["new_contract"]
            client.label_instance(ids[1], "train_1")
        found = self.offered("stop", "instance", "")
        self.assertEqual({word for word in found if not word.isdigit()}, {"train_1"}, "unique, and safe in every shell")
        self.assertEqual(found["train_1"], f"instance {ids[1]}")
        self.assertIn(str(id), found)

    def test_a_service_that_does_not_answer(self):
        self.assertEqual({}, self.offered("stop", "instance", "", VAST_URL=self.silent_service()))

    def test_little_is_loaded(self):
        code = ("import sys; sys.path.insert(0, sys.argv[1]); import vastai;"
                "vastai.main(['__complete', 'search', 'o']);"
                "print(sorted({'argparse', 'json', 're', 'socket', 'threading'} & set(sys.modules)))")
        folder = os.path.dirname(os.path.abspath(vastai.__file__))
        out = subprocess.run([sys.executable, "-I", "-S", "-c", code, folder], stdout=subprocess.PIPE, timeout=9).stdout
        self.assertEqual(["offers\tSearch GPU offers to rent", "[]"], out.decode().splitlines())

    def test_help_is_the_help(self):
        self.assertEqual(self.run_process("search", "offers", "--help").stdout,
                         self.run_process("help", "search", "offers").stdout)
        self.assertEqual(self.run_process("--help").stdout, self.run_process("help").stdout)
        self.assertIn("offers", self.run_process("help", "search").stdout)
        self.assertEqual(2, self.run_process("completion", "tcsh").returncode)


def shell(name):
    """Skips a test where that shell is not installed, or where there are no terminals to drive it with."""
    from shutil import which
    return unittest.skipUnless(which(name) and os.name == "posix", f"{name} is not installed")


class ShellsTest(ShellCase):
    """The scripts in the shells that they are for."""

    @shell("bash")
    def test_bash(self):
        ids = self.rented()
        with Terminal(["bash", "--norc", "--noprofile", "-i"], {**self.env, "PS1": "$ "}) as terminal:
            terminal.type('bind "set enable-bracketed-paste off"; eval "$(vastai completion bash)"; cd; '
                          'PS1=READ; PS1+="Y> "\n')
            terminal.expect("READY> ")
            for typed, becomes in (("vastai sear", "vastai search "), ("offers --format=cs", "offers --format=csv "),
                                   ("--ful", "--full "), ("--url http://x:1 'gpu_nam", "--url http://x:1 'gpu_name' ")):
                terminal.type(typed + "\t")
                terminal.expect(becomes)
            terminal.type("\x15\r")
            terminal.expect("READY> ")
            os.mkdir(os.path.join(self.home, "my dir"))
            with open(os.path.join(self.home, "my dir", "start.sh"), "w"):
                pass
            for typed, becomes in (("~/vastai help show conn", "help show connections "),
                                   ("vastai create instance 5 --onstart=my\tst", "--onstart=my\\ dir/start.sh "),
                                   (f"vastai destroy instances {ids[0]} {ids[1][:-1]}", f"{ids[0]} {ids[1]} "),
                                   (f"vastai stop instance {ids[0]} nothing", "nothing\x07")):
                terminal.type(typed + "\t")
                terminal.expect(becomes)
                terminal.type("\x15\r")
                terminal.expect("READY> ")

    @shell("zsh")
    def test_zsh(self):
        ids = self.rented()
        with Terminal(["zsh", "-f", "-i"], {**self.env, "PS1": "% "}) as terminal:
            terminal.type("unset zle_bracketed_paste; setopt nobeep; autoload -Uz compinit; compinit -D; cd; "
                          'eval "$(vastai completion zsh)"; PS1=READ; PS1+="Y> "\r')
            terminal.expect("READY> ")
            open(os.path.join(self.home, "start it.sh"), "w").close()
            for typed, becomes in (("vastai search off", "offers "), ("vastai show user --format=cs", "--format=csv "),
                                   ("~/vastai help show conn", "connections "), (f"vastai logs {ids[1][:-1]}", ids[1]),
                                   ("vastai create instance 5 --onstart=sta", "start\\ it.sh"),
                                   ("vastai stop i\t", "several")):
                terminal.type(typed + "\t")
                terminal.expect(becomes)
                terminal.type("\x15\r")
                terminal.expect("READY> ")

    @shell("fish")
    def test_fish(self):
        ids = self.rented()
        open(os.path.join(self.home, "start.sh"), "w").close()
        lines = ("vastai search o", "vastai show user --format=cs", "~/vastai help show conn", "vastai logs ",
                 "vastai create instance 5 --onstart=star", "vastai create instance 5 --onstart star",
                 "vastai nonsense ")
        script = "cd; vastai completion fish | source; " + "; echo ---; ".join(f"complete -C '{it}'" for it in lines)
        out = subprocess.run(["fish", "--no-config", "-c", script], env=self.env, stdout=subprocess.PIPE,
                             timeout=30).stdout
        found = [[line.split("\t") for line in part.split("\n") if line] for part in out.decode().split("---\n")]
        self.assertEqual([["offers", "Search GPU offers to rent"]], found[0])
        self.assertEqual([["--format=csv"]], found[1])
        self.assertEqual("connections", found[2][0][0])
        self.assertEqual(ids, sorted(row[0] for row in found[3]))
        self.assertEqual(["--onstart=start.sh", "start.sh"], [found[4][0][0], found[5][0][0]])
        self.assertEqual([], found[6])


class ScreenTest(ShellCase):
    """What a person at a terminal sees, and what a pipe gets."""

    def on_terminal(self, *words, **env):
        """All that a command writes to a terminal."""
        with Terminal([os.path.join(self.home, "vastai"), *words], {**self.env, **env}) as terminal:
            status = terminal.status()
            os.write(terminal.inner, b"@END@")
            return status, terminal.expect("@END@").replace("\r\n", "\n")

    def test_what_is_said_after_an_unanswered_question(self):
        with Terminal([os.path.join(self.home, "vastai"), "destroy", "instance", "7"], self.env) as terminal:
            terminal.expect("[y/N] ")
            terminal.type("\x04")
            self.assertEqual("\r\n", terminal.expect("destroy instance: not confirmed"))

    def test_sentences_are_wrapped_at_words(self):
        words = ("label", "instance", "5", "--label", "X")
        status, text = self.on_terminal(*words, COLUMNS="40")
        self.assertEqual(status, 2)
        self.assertLessEqual(max(map(len, text.split("\n"))), 40, text)
        piped = self.run_process(*words, COLUMNS="40").stderr
        self.assertEqual((piped.count("\n"), piped.split()), (1, text.split()))

    def test_a_result_takes_the_place_of_the_progress(self):
        words = ("self-test", "machine", "7", "--no-support-bundle")
        self.assertIn("\r\033[KMachine 7 failed", self.on_terminal(*words, TERM="xterm")[1])

    def test_columns_without_room_are_named(self):
        for words in (["search", "offers"], ["show", "invoices-v1", "-c"]):
            self.assertRegex(self.on_terminal(*words, COLUMNS="40", PAGER="")[1], r"\nHidden to fit: \w")

    def test_an_ascii_terminal(self):
        for columns, *words in ((42, "search", "offers"), (42, "search", "templates"), (42, "create", "instance", "--help"),
                                (80, "show", "instances", "--help")):
            status, text = self.on_terminal(*words, COLUMNS=str(columns), PYTHONIOENCODING="ascii", LC_ALL="C", PAGER="")
            self.assertEqual((status, "\\u" in text), (0, False), text)
            self.assertLessEqual(max(map(len, text.split("\n"))), columns, text)

    def test_ctrl_c_in_the_pager_is_the_pager_s(self):
        pager = ("import sys, time\ntry:\n print('READY', flush=True)\n time.sleep(60)\n"
                 "except KeyboardInterrupt:\n print('CAUGHT')\nsys.stdin.read()\nprint('DONE')")
        env = {**self.env, "PAGER": shlex.join([sys.executable, "-c", pager])}
        with Terminal([os.path.join(self.home, "vastai"), "search", "offers", "--limit", "60"], env) as terminal:
            terminal.expect("READY")
            terminal.type("\x03")
            terminal.expect("CAUGHT")
            terminal.expect("DONE")
            self.assertEqual(terminal.status(), 0)

    def test_tables(self):
        _, text = self.on_terminal("search", "offers", COLUMNS="80", PAGER="")
        header = text.split("\n")[0]
        self.assertIn("Hidden to fit: ", text)
        self.assertRegex(text, "RTX_[0-9]")
        self.assertLessEqual(max(map(len, text.split("\n"))), 80, text)
        piped = self.run_process("search", "offers")
        lines = [line.split() for line in piped.stdout.splitlines()]
        self.assertGreater(len(lines[0]), len(header.split()))
        self.assertTrue(all(len(line) >= len(lines[0]) and line[0].isdigit() for line in lines[1:]), piped.stdout)
        self.assertTrue(all(line[:1].isdigit() for line in piped.stdout.splitlines()[1:]))

    def test_progress(self):
        id = self.rented()[0]
        instance = self.box.market.tables["instances"][int(id)]
        instance.behavior = {**instance.behavior, "status": "loading"}
        words = ("wait", "instance", id, "--max-wait", "0.5")
        piped = self.run_process(*words)
        self.assertEqual((piped.returncode, piped.stderr.count(f"instance {id}: loading\n")), (9, 1), piped.stderr)
        self.assertEqual(self.run_process(*words, "--raw").stderr.count("\n"), 1, "the error alone")
        env = {**self.env, "TERM": "xterm", "COLUMNS": "40"}
        with Terminal([os.path.join(self.home, "vastai"), *words[:3], "--max-wait", "60"], env) as terminal:
            terminal.expect(f"{vastai.CLEAR}instance {id}: loading")
            terminal.type("\x03")
            self.assertEqual(terminal.status(), 130)
            os.write(terminal.inner, b"@END@")
            self.assertTrue(terminal.expect("@END@").endswith(vastai.CLEAR), "the prompt begins at the margin")

    def test_which_condition_excludes_most(self):
        words = ("search", "offers", "gpu_name=RTX_4090 dph<0.01 reliability>0.5 inet_down>1")
        _, text = self.on_terminal(*words, COLUMNS="120")
        self.assertRegex(text, r"Without dph_total<0.01 there would be \d+ offers\.")
        self.assertEqual(len(self.box.requests), 3)

    def redrawn(self, *words, **env):
        """What a watch writes to a terminal, when there was time for more than one look."""
        for seconds in ("0.1", "1", "5"):
            status, text = self.on_terminal(*words, "--max-wait", seconds, **env)
            if "\033[J" in text:
                break
        return status, text

    def test_a_table_that_is_redrawn(self):
        self.rented()
        ascii = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        for columns, encoding in (("80", {}), ("80", ascii), ("120", {}), ("200", ascii)):
            with self.subTest(columns=columns, encoding=encoding):
                env = {"TERM": "xterm", "COLUMNS": columns, "NO_COLOR": "1", **encoding}
                status, text = self.redrawn("watch", "instances", **env)
                first, again = text.split("\033[")[0], text.rpartition("\033[J")[2]
                self.assertEqual(status, 9)
                self.assertEqual(text.count("\033["), 2 * text.count("\033[J"), "up, and clear what is below")
                self.assertIn(f"\033[{first.count(chr(10))}F", text)
                self.assertLessEqual(max(map(vastai.display_width, first.split("\n"))), int(columns))
                bar = "* 72%" if encoding else "\u2586 72%"
                self.assertIn(bar, first)
                self.assertRegex(again, r"\$0\.\d+/hr, .*; credit \$\d+\.\d\d lasts")
                if columns != "80":
                    self.assertIn(f" {bar[0] * 2}", again, "two samples")
                self.assertEqual(text.isascii(), bool(encoding), text)
        status, text = self.redrawn("watch", "offers", "num_gpus=1", TERM="xterm", COLUMNS="80")
        first, _, again = text.partition("\033[J")
        self.assertIn("\033[32m+\033[0m", first)
        self.assertNotIn("\033[32m+", again)

    def test_trends(self):
        _, text = self.on_terminal("show", "gpu-trends", "RTX_5090", COLUMNS="120")
        self.assertRegex(" ".join(text.split()), "median [\u2581-\u2588]{20,} \\$0\\.\\d+ to \\$0\\.\\d+/hr; 1 point in 2 ")

    def test_what_goes_on_costing(self):
        """On a terminal alone: it takes another request."""
        with vastai.VastAI(api_key=self.box.key, server_url=self.box.url) as client:
            offer = next(iter(self.box.market.tables["volume_offers"]))
            stopped = client.show_instances()[0]["id"]
            id = client.create_instance(id=self.box.offer()["id"], image="i", create_volume=offer, volume_size=72,
                                        mount_path="/data")["new_contract"]
        volume = self.box.market.rows("volumes")[0]["id"]
        before = len(self.box.requests)
        self.run_process("stop", "instance", str(stopped))
        self.run_process("show", "user")
        self.assertEqual(len(self.box.requests), before + 2)
        _, text = self.on_terminal("stop", "instance", str(stopped), COLUMNS="120")
        self.assertRegex(text, rf"Its disk is still billed: \$0\.\d+/hr, \$\d+\.\d\d/month; stop paying with `vastai destroy instance {stopped}`")
        _, text = self.on_terminal("destroy", "instance", str(id), "--yes", COLUMNS="120")
        self.assertRegex(text, rf"Volume {volume} stays and is billed at \$0\.\d+/hr; stop paying with `vastai delete volume {volume}`")
        _, text = self.on_terminal("show", "user", COLUMNS="120")
        self.assertRegex(text, r"/month; credit \$\d+\.\d\d lasts \d+d \d+h, until 20")

    def test_what_goes_to_stderr_is_escaped(self):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            vastai.warn("red \x1b[31m, right to left \u202e, a line \u2028 and \r")
            vastai.show_progress("\x1b]0;title\x07", in_pipe=True)
            vastai.show_progress("")
        self.assertEqual(err.getvalue(), "vastai: red \\x1b[31m, right to left \\u202e, a line \\u2028 and \\r\n"
                                         "\\x1b]0;title\\x07\n")

    def test_progress_at_a_terminal_that_cannot_redraw(self):
        code = "import vastai\nfor text in ('one', 'one', 'two', ''): vastai.show_progress(text, '3 s')"
        env = {**self.env, "TERM": "dumb", "PYTHONPATH": os.path.dirname(os.path.abspath(vastai.__file__))}
        with Terminal([sys.executable, "-c", code], env) as terminal:
            self.assertEqual(terminal.expect("two").split(), ["one"])
            self.assertEqual(terminal.status(), 0)

    def test_a_secret_is_not_shown(self):
        code = "import vastai; vastai.write_out(repr(vastai.ask_secret('API key')))"
        env = {**self.env, "PYTHONPATH": os.path.dirname(os.path.abspath(vastai.__file__))}
        with Terminal([sys.executable, "-c", code], env) as terminal:
            terminal.expect("API key: ")
            terminal.type("sesame\n")
            self.assertEqual((terminal.expect("'sesame'").strip(), terminal.status()), ("", 0))
        saved = os.path.join(self.home, "config", "vastai", "vast_api_key")
        for words in (["set", "api-key"], ["set", "api-key", "-"]):
            with Terminal([os.path.join(self.home, "vastai"), *words], self.env) as terminal:
                terminal.expect(": ")
                terminal.type("open-sesame-1\n")
                self.assertEqual(terminal.status(), 0)
                os.write(terminal.inner, b"@END@")
                self.assertNotIn("sesame", terminal.expect("@END@"))
            self.assertEqual(vastai.read_key(saved), "open-sesame-1")
            os.unlink(saved)
        for typed in ("\n", "\x04"):
            with Terminal([os.path.join(self.home, "vastai"), "set", "api-key"], self.env) as terminal:
                terminal.expect("API key: ")
                terminal.type(typed)
                self.assertEqual((terminal.expect("set api-key: no API key was typed"), terminal.status()), ("\r\n", 2))
        for text, shown in ((" sesame \nmore\n", "'sesame'"), ("", "")):
            done = subprocess.run([sys.executable, "-c", code], env=env, input=text, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
            self.assertEqual((done.stdout, "on stdin; pipe it in" in done.stderr), (shown, not shown))


class ReplTest(ShellCase):
    """Many commands in one process."""

    def test_a_script(self):
        connections, accept = [], self.box.server.get_request
        self.box.server.get_request = lambda: connections.append(accept()) or connections[-1]
        script = ("# a remark that isn't read\n\nshow user --fields id\n"
                  "vastai search offers 'num_gpus=1' --limit 1 --format csv --fields id\nshow instance 999\n"
                  "help search offers\nrepl\nshow ssh-keys 'open\nnonsense\nshow user --raw --fields id\n")
        done = self.run_process("--quiet", "repl", text=script)
        self.assertEqual(2, done.returncode, "the last that failed")
        self.assertEqual(1, len(connections), "one connection for all")
        self.assertIn("is not closed", done.stderr)
        self.assertIn("prompt already", done.stderr)
        self.assertIn("usage: vastai search offers", done.stdout)
        self.assertNotIn("vastai>", done.stdout + done.stderr)
        self.assertFalse(os.path.exists(os.path.join(self.cache, "history")))

    def test_statuses_and_ends(self):
        self.assertEqual(0, self.run_process("repl", text="show user\nexit\nnonsense\n").returncode)
        self.assertEqual(0, self.run_process("repl", text="\ufeffshow user\r\n\r\nshow user\r\n").returncode)
        wide = subprocess.run([os.path.join(self.home, "vastai"), "repl"], env=self.env, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, input="show user\nshow user\n".encode("utf-16"), timeout=60)
        self.assertEqual((wide.returncode, wide.stdout), (2, b""), "half a script is worse than none")
        self.assertEqual(0, self.run_process("repl", text=f"# a line is not cut {'x' * 200_000}\n").returncode)
        self.assertEqual(0, self.run_process("repl", text="").returncode)
        self.assertEqual(4, self.run_process("repl", text="show instance 999\nquit\n").returncode)
        self.assertEqual(4, self.run_process("repl", text="show instance 999\nshow user\n", HOME="/no").returncode)

    def test_global_options_hold(self):
        nowhere = "http://127.0.0.1:9"
        script = "show user --fields id\nshow user --fields id --format csv\nshow instance 999\nshow 'x\n"
        done = self.run_process("--raw", "--url", self.box.url, "repl", "--api-key", "another-key-5678", text=script,
                           VAST_URL=nowhere)
        self.assertIn('{\n "id": ', done.stdout)
        self.assertIn("\nid\n", done.stdout)
        self.assertEqual([True] * 2, [json.loads(line)["error"] for line in done.stderr.splitlines()])
        self.assertEqual("Bearer another-key-5678", self.box.requests[-1]["headers"]["Authorization"])
        self.assertEqual(2, self.run_process("repl", "--retry", "x", text="show user\n").returncode)
        self.assertEqual(0, self.run_process("--curl", "repl", text="reboot instance 5\n", VAST_URL=nowhere).returncode)

    def test_answers_to_questions_come_from_the_script(self):
        first, second = self.rented()
        script = f"destroy instance {first}\ny\ndestroy instance {second}\nn\n"
        self.assertEqual(2, self.run_process("repl", text=script).returncode)
        self.assertEqual([second], self.run_process("show", "instances", "-q").stdout.split())

    @unittest.skipUnless(os.name == "posix", "needs a terminal")
    def test_at_a_terminal(self):
        try:
            import readline  # noqa: F401
        except ImportError:
            self.skipTest("this Python has no readline")
        with Terminal(["vastai", "repl"], self.env) as terminal:
            terminal.expect("vastai> ")
            terminal.type("sho\tuser --fiel\tid\n")
            terminal.expect("show user --fields id")
            terminal.expect("vastai> ")
            terminal.type("show instance 999\n")
            terminal.expect("vastai [4]> ")
            terminal.type("show user 'half a li")
            terminal.expect("half a li")
            time.sleep(0.2)  # Python loses a Ctrl-C that comes in the moment before it waits
            terminal.type("\x03")
            terminal.expect("vastai [4]> ")
            terminal.type(f"show user --url {self.silent_service()}\n")
            time.sleep(0.5)
            terminal.type("\x03")
            terminal.expect("vastai [130]> ")
            terminal.type("set api-key topsecret1\n")
            terminal.expect("vastai> ")
            terminal.type("vastai show user --api-k topsecret2 --fields id\n")
            terminal.expect("vastai> ")
            terminal.type("set api-kye topsecret3\n")
            terminal.expect("vastai [2]> ")
            terminal.type("\x04")
            self.assertEqual(0, terminal.status())
        path = os.path.join(self.cache, "history")
        self.assertEqual(0o600, os.stat(path).st_mode & 0o777)
        with open(path) as file:
            kept = file.read()
        self.assertNotIn("topsecret", kept)
        self.assertEqual(["show", "user", "--fields", "id", "show", "instance", "999", "show"], kept.split()[:8])
        with Terminal(["vastai", "repl"], {**self.env, "XDG_CACHE_HOME": os.devnull}) as terminal:
            terminal.expect("vastai> ")
            terminal.type("show user --fields id\nexit\n")
            self.assertEqual(0, terminal.status())
        with Terminal(["vastai", "repl"], self.env) as terminal:
            terminal.expect("vastai> ")
            terminal.type("\x1b[A" * 2)
            terminal.expect("show instance 999")
            terminal.type("\x15quit\n")
            self.assertEqual(0, terminal.status())


# ---------------------------------------------------------------------------------- invoices as PDF


class Piped:
    """A FIFO, and a thread that reads from it; it must be there until the end."""

    def __init__(self, path):
        self.path, self.data = path, b""
        os.mkfifo(path)
        self.thread = threading.Thread(target=self.read, daemon=True)

    def read(self):
        with open(self.path, "rb") as file:
            self.data = file.read()

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc_info):
        self.thread.join(5)
        os.unlink(self.path)


class PdfTest(unittest.TestCase):
    """The invoice as a PDF, read back by its cross-reference table."""

    USER = {"username": "jdoe", "email": "jane@example.com", "fullname": "Jane Doe", "billaddress_line1": "12 Long St",
            "billaddress_line2": None, "billaddress_city": "Malm\u00f6", "billaddress_zip": "211 20"}

    @staticmethod
    def row(**changes):
        return {"description": "GPU hours", "quantity": "24.000", "rate": "0.2000", "amount": "4.800",
                "timestamp": 1714521600, "type": "charge", **changes}

    def objects(self, data):
        """Return the content of every object, found by the offsets of the table alone."""
        self.assertTrue(data.startswith(b"%PDF-1.4\n") and data.endswith(b"%%EOF\n"))
        start = int(data[data.rindex(b"startxref\n") + 10:].split()[0])
        head, count = data[start:].split(b"\n", 2)[:2]
        self.assertEqual(b"xref", head)
        first = start + len(head) + len(count) + 2
        size = int(count.split()[1])
        entries = [data[first + 20 * index:first + 20 * index + 20] for index in range(size)]
        self.assertEqual(b"0000000000 65535 f \n", entries[0])
        self.assertTrue(data[first + 20 * size:].startswith(b"trailer\n<< /Size %d " % size))
        found = {}
        for number, entry in enumerate(entries[1:], 1):
            self.assertEqual(b" 00000 n \n", entry[10:])
            mark = b"%d 0 obj\n" % number
            offset = int(entry[:10])
            self.assertEqual(mark, data[offset:offset + len(mark)])
            end = entries[number + 1][:10] if number + 1 < size else b"%d" % start
            self.assertTrue(data[:int(end)].endswith(b"\nendobj\n"))
            found[number] = data[offset + len(mark):int(end) - 8]
        return found

    def pages(self, data):
        """Return a list per page of its texts as (font, size, x, y, text)."""
        result = []
        objects = self.objects(data)
        for kid in re.findall(rb"(\d+) 0 R", re.search(rb"/Kids \[(.*?)\]", objects[2]).group(1)):
            content = objects[int(re.search(rb"/Contents (\d+) 0 R", objects[int(kid)]).group(1))]
            length = int(re.search(rb"/Length (\d+)", content).group(1))
            packed = content[content.index(b"stream\n") + 7:content.rindex(b"\nendstream")]
            self.assertEqual(length, len(packed))
            texts = re.findall(rb"^BT /(F\d) (\d+) Tf [\d. ]+ r?g ([\d.-]+) ([\d.-]+) Td \((.*)\) Tj ET$",
                               zlib.decompress(packed), re.M)
            result.append([(font.decode(), int(size), float(x), float(y),
                            re.sub(rb"\\(.)", rb"\1", text).decode("cp1252")) for font, size, x, y, text in texts])
        self.assertIn(b"/Count %d " % len(result), objects[2])
        return result

    def texts(self, *arguments, **options):
        return [text[-1] for page in self.pages(vastai.invoice_pdf(*arguments, **options)) for text in page]

    def description(self, value):
        """Return the lines in which a description shows."""
        page = self.pages(vastai.invoice_pdf([self.row(description=value)], {}))[0]
        return [text for _, size, x, _, text in page if (size, x) == (9, 114)]

    def test_header_and_totals(self):
        texts = self.texts([self.row()], self.USER, number="24293", period="May 2024", totals=[("Total", "$4.80")])
        for text in ("Vast.ai", "Invoice", "24293", "May 2024", "Jane Doe", "12 Long St", "Malm\u00f6 211 20", "jdoe",
                     "jane@example.com", "2024-05-01", "GPU hours", "24", "$0.20", "$4.80", "Total", "Page 1 of 1"):
            self.assertIn(text, texts)
        self.assertEqual(2, texts.count("$4.80"))
        self.assertNotIn("None", texts)

    def test_invoices_of_several_pages(self):
        with Sandbox() as box, temporary_folder() as folder, vastai.VastAI(box.key, box.url) as client:
            path = os.path.join(folder, "bills.pdf")
            born = box.market.born
            if hasattr(os, "mkfifo"):  # a device or a FIFO is written into
                with Piped(path) as pipe:
                    client.show_invoices_v1(start_date=born - 99 * DAY, end_date=born, pdf=path)
                self.assertEqual(pipe.data[:5], b"%PDF-")
            client.show_invoices_v1(start_date=born - 99 * DAY, end_date=born, limit=5, pdf=path)
            with open(path, "rb") as file:
                texts = [text[-1] for page in self.pages(file.read()) for text in page]
            paid = [row for row in box.market.rows("payments") if row["amount_cents"] == 2500]
            self.assertEqual(sum(text in ("$25.00", "-$25.00") for text in texts), len(paid))
            self.assertIn("Ada Example", texts)
            client.show_invoices_v1(charges=True, start_date=born - 3 * DAY, end_date=born, pdf=path)
            with open(path, "rb") as file:
                texts = [text[-1] for page in self.pages(file.read()) for text in page]
            self.assertTrue([text for text in texts if "charges" in text])

    def test_the_same_input_gives_the_same_bytes(self):
        first, second = (vastai.invoice_pdf([self.row()], self.USER) for _ in range(2))
        self.assertEqual(first, second)
        self.assertNotIn(b"CreationDate", first)

    def test_information_dictionary(self):
        data = vastai.invoice_pdf([], {}, title="Invoice \u20ac", number="7)")
        number = int(re.search(rb"/Info (\d+) 0 R", data).group(1))
        information = self.objects(data)[number]
        title = bytes.fromhex(re.search(rb"/Title <([0-9a-f]+)>", information).group(1).decode())
        self.assertEqual("Invoice \u20ac 7)", title.decode("utf-16"))
        self.assertIn(b"/Producer (vastai)", information)

    def test_nothing_in_the_period(self):
        self.assertIn("There is nothing in this period.", self.texts([], {}))
        self.assertNotIn("There is nothing in this period.", self.texts([{}], {}))

    def test_null_and_missing_values(self):
        nothing = dict.fromkeys(("description", "quantity", "rate", "amount", "timestamp", "type"))
        texts = self.texts([{}, nothing], dict.fromkeys(self.USER))
        self.assertNotIn("None", texts)
        self.assertNotIn("BILLED TO", texts)

    def test_payment_shows_its_amount_alone(self):
        texts = self.texts([self.row(type="payment", description=None, amount=-50, quantity=1, rate=7)], {})
        self.assertIn("Payment", texts)
        self.assertIn("-$50.00", texts)
        self.assertNotIn("$7.00", texts)

    def test_amounts(self):
        for value, shown in (("4.800", "$4.80"), (0.1 + 0.2, "$0.30"), ("1234567.125", "$1,234,567.125"), (0, "$0.00"),
                             (-0.00001, "$0.00"), ("-3", "-$3.00"), ("$5 off", "$5 off"), ("NaN", "NaN"),
                             ("\u22125 EUR", "-5 EUR"), ("1e999999999", "1e999999999"), ("1e-999999999", "$0.00"),
                             (float("inf"), "inf"), (True, "True")):
            with self.subTest(value=value):
                self.assertIn(shown, self.texts([self.row(amount=value)], {}))

    def test_dates(self):
        for value, shown in ((0, "1970-01-01"), ("1714607999.9", "2024-05-01"), (-1, "1969-12-31"), (1e30, "1e+30"),
                             ("soon", "soon"), (float("nan"), "nan")):
            with self.subTest(value=value):
                self.assertIn(shown, self.texts([self.row(timestamp=value)], {}))

    def test_characters(self):
        for value, shown in (
                ("caf\u00e9 \u20ac \u2026", "caf\u00e9 \u20ac \u2026"), ("e\u0301", "\u00e9"), ("\u0107\ufb01", "cfi"),
                ("\u0141\u00f3d\u017a", "?\u00f3dz"), ("\u4e2d\U0001f600", "??"), ("\u2153", "?"), ("\u0301", "?"),
                ("a\nb\r\nc\td", "a b c d"), ("a\u2003b", "a b"), ("a\x00\x1b\x7f\x81b", "a????b"),
                ("a\u200b\u202e\u00ad\u2028\u2029b", "a??? b"), ("\udc80", "?"), ("(\\) \\n \\", "(\\) \\n \\")):
            with self.subTest(value=value):
                self.assertEqual([shown], self.description(value))

    def test_numbers_end_at_the_right_edge(self):
        units = {".": 278, ",": 278, "-": 333}  # a digit and "$" are 556
        rows = [self.row(quantity=quantity, rate=quantity, amount=quantity) for quantity in ("1.5", "-1234.25", "777")]
        ends = set()
        for _, size, x, _, text in self.pages(vastai.invoice_pdf(rows, {}))[0]:
            if size == 9 and x > 354:
                ends.add(round(x + sum(units.get(letter, 556) for letter in text) * size / 1000))
        self.assertEqual({420, 484, 558}, ends)

    def test_long_numbers_stay_in_their_column(self):
        page = self.pages(vastai.invoice_pdf([self.row(quantity="9" * 1000, amount="8" * 1000)], {}))[0]
        for digit, left in (("9", 360), ("8", 488)):
            (x, text), = [(text[2], text[-1]) for text in page if text[-1].startswith(digit * 2)]
            self.assertGreaterEqual(x, left)
            self.assertTrue(text.endswith("\u2026"))

    def test_long_descriptions_wrap(self):
        words = " ".join(f"word{index}" for index in range(40))
        lines = self.description(words)
        self.assertGreater(len(lines), 3)
        self.assertEqual(words, " ".join(lines))
        lines = self.description("tiny " + "W" * 100)
        self.assertEqual("tiny", lines[0])
        self.assertEqual("W" * 100, "".join(lines[1:]))
        self.assertLessEqual(max(map(len, lines)), 28)  # 28 times 0.944 times 9 points is less than 240

    def test_descriptions_are_cut(self):
        shown = "".join(self.description("x" * 10 ** 6))
        self.assertEqual("x" * 499 + "\u2026", shown)
        self.assertEqual("x" * 500, "".join(self.description("x" * 500)))

    def test_pages(self):
        rows = [self.row(description=f"row {index} " + "long " * (index % 40), amount=index) for index in range(150)]
        pages = self.pages(vastai.invoice_pdf(iter(rows), self.USER, number="9", totals=[("Sum", "1"), ("Total", "2")]))
        self.assertGreater(len(pages), 3)
        shown = []
        for number, page in enumerate(pages, 1):
            texts = [text[-1] for text in page]
            self.assertEqual(1, texts.count("DESCRIPTION"))
            self.assertIn(f"Page {number} of {len(pages)}", texts)
            self.assertEqual(number > 1, "Invoice 9" in texts)
            self.assertTrue(all(y >= 60 for *_, y, text in page if text not in texts[-2:]))
            heights = {text[-1]: text[3] for text in page}
            for text in texts:
                if text.startswith("row "):
                    index = text.split()[1]
                    shown.append(int(index))
                    self.assertEqual(heights[text], heights[f"${index}.00"])
            first = next(text for text in page if text[2] == 114 and text[1] == 9)
            self.assertTrue(first[-1].startswith("row "))  # no row begins on one page and ends on the next
        self.assertEqual(list(range(150)), shown)
        self.assertEqual(["Sum", "1", "Total", "2"], [text[-1] for text in pages[-1]][-6:-2])

    def test_totals_stay_together(self):
        for count in range(20, 40):
            totals = [(f"label {index}", f"{index}") for index in range(5)]
            pages = self.pages(vastai.invoice_pdf([self.row()] * count, {}, totals=totals))
            self.assertIn(5, [sum(text[-1].startswith("label ") for text in page) for page in pages])

    def test_many_rows(self):
        data = vastai.invoice_pdf((self.row(description=f"Instance {index}") for index in range(10000)), self.USER)
        self.assertEqual(10000, sum(text[-1].startswith("Instance ") for page in self.pages(data) for text in page))

    def test_hostile_texts(self):
        huge = "\u0142(\\ \x00" * 200000
        row = dict.fromkeys(("description", "quantity", "rate", "amount", "timestamp", "type"), huge)
        data = vastai.invoice_pdf([row] * 50, dict.fromkeys(self.USER, huge), title=huge, number=huge, period=huge,
                                  totals=[(huge, huge)] * 100)
        for page in self.pages(data):
            self.assertTrue(all(54 <= x <= 558 and 40 <= y <= 730 for _, _, x, y, _ in page))

    @unittest.skipUnless(shutil.which("qpdf"), "needs qpdf")
    def test_qpdf_finds_no_fault(self):
        for count in (0, 1, 200):
            with self.subTest(rows=count), temporary_folder() as folder:
                path = os.path.join(folder, "invoice.pdf")
                with open(path, "wb") as file:
                    file.write(vastai.invoice_pdf([self.row()] * count, self.USER, totals=[("Total", "$1")]))
                done = subprocess.run(["qpdf", "--check", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                self.assertEqual(0, done.returncode, done.stdout)
                self.assertNotIn(b"WARNING", done.stdout)

    @unittest.skipUnless(shutil.which("pdftotext"), "needs pdftotext")
    def test_pdftotext_gives_every_row_back(self):
        rows = [self.row(description=f"Label (no. {index}) \\ caf\u00e9", amount=index + 0.5) for index in range(100)]
        with temporary_folder() as folder:
            path = os.path.join(folder, "invoice.pdf")
            with open(path, "wb") as file:
                file.write(vastai.invoice_pdf(rows, self.USER))
            done = subprocess.run(["pdftotext", "-layout", "-enc", "UTF-8", path, "-"], stdout=subprocess.PIPE)
        lines = [" ".join(line.split()) for line in done.stdout.decode("utf-8").splitlines()]
        for index in range(100):
            self.assertIn(f"2024-05-01 Label (no. {index}) \\ caf\u00e9 24 $0.20 ${index}.50", lines)


# ==================================================================================================
# 4. WHAT IS WRITTEN FROM THE TABLE
# ==================================================================================================

# ----------------------------------------------------- stubs, the README's list, the pinned surface


def stub(name, row):
    """The lines of one method for type checkers: signature, docstring, body."""
    parameters, optional = ["self"], False
    for arg in (arg for arg in row.args if arg.face != "cli"):
        required = arg.default is vastai.REQUIRED
        if optional and required:
            parameters.append("*")
        optional = optional or not required
        parameters.append(f"{arg.name}: {arg.annotation}" + ("" if required else f" = {arg.default!r}"))
    doc = f'"{row.summary[:1].upper()}{row.summary[1:]}."; ...'
    head, tail = f"        def {name}(", f") -> {row.annotation}:"
    line = f"{head}{', '.join(parameters)}{tail}"
    if len(line) + len(doc) < 120:
        return [f"{line} {doc}"]
    lines, words = [head], [f"{part}," for part in parameters[:-1]] + [parameters[-1] + tail]
    for word in [part for word in words for part in (word.replace(", ", ",\n").split("\n") if len(word) > 60 else [word])]:
        if len(lines[-1]) + len(word) >= 119:
            lines.append(" " * 16 + word)
        else:
            lines[-1] += word if lines[-1] == head else f" {word}"
    return [*lines, f"            {doc}"]


def stub_block():
    """The block of vastai.py between `# stubs: begin` and `# stubs: end`."""
    lines = ["    if TYPE_CHECKING:  # written by `python3 test_vastai.py write`"]
    for name, row in vastai.METHODS.items():
        lines += stub(name, row) if name == row.methods[0] else [f"        {name} = {row.methods[0]}"]
    return "\n".join(lines) + "\n"


def reference_block():
    """The README's list of commands, a line each, by the groups of the help."""
    lines, group = [], ""
    for row in vastai.COMMANDS.values():
        if row.group != group:
            group = row.group
            lines += ["", f"### {group}", "", "| command | method | |", "| --- | --- | --- |"]
        command = f"`vastai {row.name}`" if row.face != "sdk" else ""
        method = f"`{row.methods[0]}()`" if row.face != "cli" else ""
        lines.append(f"| {command} | {method} | {row.summary} |")
    return "\n".join(lines[1:]) + "\n"


def surface_of(row):
    """A command with everything that a caller can give it and what it may do: in one line, or else in a line for each
    argument.
    """
    head = [row.name, *(f"/{alias}" for alias in row.aliases), *(f"/{name}()" for name in row.methods[1:])]
    head += {"sdk": ["(sdk)"], "cli": ["(cli)"]}.get(row.face, [])
    words = []
    for arg in row.args:
        default = "" if arg.default is vastai.REQUIRED else f"={arg.default!r}"
        default += "" if arg.cli == arg.default else f"|{arg.cli!r}"
        marks = {"sdk": "(sdk)", "cli": "(cli)"}.get(arg.face, "") + "".join(f"/{old}" for old in arg.old)
        flags = ",".join([*arg.flags, *arg.shortcuts])
        choices = "{" + ",".join(map(str, arg.choices)) + "}" if arg.choices else ""
        name = "" if arg.name == arg.flags[-1].lstrip("-").replace("-", "_") else f"->{arg.name}"
        words.append(f"{flags}{name}:{arg.kind.metavar}{'+' * arg.many}{choices}{default}{marks}")
    marks = ["" if row.safe else "ONCE", "" if row.effect == vastai.READS else row.effect]
    marks.append({"terminal": "asks(terminal)"}.get(row.ask_when, "asks") if row.ask or row.asks else "")
    words.append(" ".join(["->", row.annotation, *filter(None, marks)]))
    line = " ".join(head + words)
    return line if len(line) <= 120 else "\n    ".join([" ".join(head), *words])


def surface_block():
    return "SURFACE = r'''\n" + "\n".join(surface_of(row) for row in vastai.COMMANDS.values()) + "\n'''\n"


def contents_block():
    """The list of parts and sections in the docstring of this file, from its banners."""
    with open(os.path.join(HERE, "test_vastai.py"), encoding="utf-8") as source:
        text = source.read()
    lines = []
    for part, section in re.findall(r"^# (?:={90,}\n# (\d+\. .*)|-{20,} (.*))$", text, re.MULTILINE):
        if part:
            lines.append(f"  {part}:")
        elif lines[-1].endswith(":"):
            lines[-1] += f" {section}"
        elif len(lines[-1]) + len(section) < 116:
            lines[-1] += f" | {section}"
        else:
            lines[-1] += " |"
            lines.append(f"     {section}")
    return "\n".join(lines) + "\n"


# {what is written: (file, the line before it, the line after it, what makes it)}
BLOCKS = {
    "stubs": ("vastai.py", "    # stubs: begin\n", "    # stubs: end\n", stub_block),
    "reference": ("README.md", "<!-- commands: begin -->\n", "<!-- commands: end -->\n", reference_block),
    "surface": ("test_vastai.py", "# surface: begin\n", "# surface: end\n", surface_block),
    "contents": ("test_vastai.py", "The file in order:\n", "\nThe sandbox is a small", contents_block),
}


def block(name, write=False):
    """(what a generated block holds, what it should hold); with `write` it is brought up to date."""
    file, begin, end, make = BLOCKS[name]
    with open(os.path.join(HERE, file), encoding="utf-8") as source:
        text = source.read()
    before, _, rest = text.partition("\n" + begin)
    found, _, after = rest.partition(end)
    made = make()
    if write and found != made:
        with open(os.path.join(HERE, file), "w", encoding="utf-8") as target:
            target.write(f"{before}\n{begin}{made}{end}{after}")
    return found, made


def write(arguments, names=tuple(BLOCKS)):
    """Write what follows from the table: type stubs, the README's list of commands, the pinned surface."""
    argparse.ArgumentParser(prog="test_vastai.py write", description=write.__doc__).parse_args(arguments)
    for name in names:
        found, made = block(name, write=True)
        print(f"{BLOCKS[name][0]}: {name} {'unchanged' if found == made else 'written'}")
    return 0


# ------------------------------------------------------------------------------- the pinned surface

# surface: begin
SURFACE = r'''
search offers /search instances
    query:QUERY+=None|''
    -t,--type,-i,--interruptible,-b,--bid,-r,--reserved,-d,--on-demand:KIND{on-demand,bid,reserved,interruptible}='on-demand'
    -o,--order:FIELDS=None
    --limit:N=None
    --storage:GB=None
    -n,--no-default:TEXT=False
    --hours:HOURS=None
    --down:GB=None
    --up:GB=None
    --new:TEXT=False(cli)
    --disable-bundling:TEXT=False
    -> list[Offer]
watch offers (cli)
    query:QUERY+=None|''
    -t,--type,-i,--interruptible,-b,--bid,-r,--reserved,-d,--on-demand:KIND{on-demand,bid,reserved,interruptible}='on-demand'
    --storage:GB=None
    -n,--no-default:TEXT=False
    --interval:SECONDS=60
    --below:USD=None
    --exec:COMMAND=None
    --once:TEXT=False
    --max-wait:SECONDS=None
    -> None
watch instances (cli)
    --interval:SECONDS=10
    --below:USD=None
    --exec:COMMAND=None
    --once:TEXT=False
    --max-wait:SECONDS=None
    -> None
search offers-new (sdk)
    query:QUERY+=None
    --type:KIND{on-demand,bid,reserved,interruptible}='on-demand'
    -o,--order:FIELDS=None
    --limit:N=None
    --storage:GB=None
    -n,--no-default:TEXT=False
    -> list[Offer]
search templates query:QUERY+=None|'' -> list[Template]
show template id:TEMPLATE -> Template
create instance
    id:OFFER/ID
    --image:IMAGE=None
    --disk:GB=10
    --env:ENV=None
    --bid_price->price:USD=None
    --label:NAME=None
    --extra:JSON=None
    --onstart-cmd:COMMAND=None/onstart/entrypoint
    --login:TEXT=None
    --python-utf8:TEXT=False
    --lang-utf8:TEXT=False
    --jupyter-lab:TEXT=False
    --jupyter-dir:PATH=None
    --force:TEXT=False
    --cancel-unavail:TEXT=False
    --template_hash:HASH=None/template_hash_id
    --user:USER=None
    --runtype:TEXT=None(sdk)
    --args:TEXT=None
    --volume-info:JSON=None(sdk)
    --bid-price:USD=None(sdk)
    --ssh:TEXT=False
    --jupyter:TEXT=False
    --direct:TEXT=False
    --create-volume:OFFER=None
    --link-volume:VOLUME=None
    --volume-size:GB=None
    --mount-path:PATH=None
    --volume-label:NAME=None
    --onstart:FILE=None(cli)
    --entrypoint:COMMAND=None(cli)
    --target_state:TEXT{running,stopped}=None
    --vm:TEXT=False
    --args_str:TEXT=None
    --wait:TEXT=False
    --max-wait:SECONDS=600
    --confirm:TEXT=False
    --max-hours:HOURS=None
    --spot:TEXT=False(cli)
    -> CreatedInstance ONCE spends
create instances
    ids:OFFER+
    --image:IMAGE=None
    --disk:GB=10
    --env:ENV=None
    --bid_price->price:USD=None
    --label:NAME=None
    --extra:JSON=None
    --onstart-cmd:COMMAND=None/onstart/entrypoint
    --login:TEXT=None
    --python-utf8:TEXT=False
    --lang-utf8:TEXT=False
    --jupyter-lab:TEXT=False
    --jupyter-dir:PATH=None
    --force:TEXT=False
    --cancel-unavail:TEXT=False
    --template_hash:HASH=None/template_hash_id
    --user:USER=None
    --runtype:TEXT=None(sdk)
    --args:TEXT=None
    --volume-info:JSON=None(sdk)
    --bid-price:USD=None(sdk)
    --ssh:TEXT=False
    --jupyter:TEXT=False
    --direct:TEXT=False
    --create-volume:OFFER=None
    --link-volume:VOLUME=None
    --volume-size:GB=None
    --mount-path:PATH=None
    --volume-label:NAME=None
    --onstart:FILE=None(cli)
    --entrypoint:COMMAND=None(cli)
    --target_state:TEXT{running,stopped}=None
    --vm:TEXT=False
    --args_str:TEXT=None
    --max-hours:HOURS=None
    --spot:TEXT=False(cli)
    -> dict[str, Any] ONCE spends
launch instance
    -g,--gpu-name:GPU=None
    -n,--num-gpus:N=None
    -i,--image:IMAGE=None
    -r,--region:REGION=None
    -d,--disk:GB=10|16.0
    -o,--order:FIELDS=None
    --limit:N=None|3
    --env:ENV=None
    --label:NAME=None
    --extra:JSON=None
    --onstart-cmd:COMMAND=None/onstart/entrypoint
    --login:TEXT=None
    --python-utf8:TEXT=False
    --lang-utf8:TEXT=False
    --jupyter-lab:TEXT=False
    --jupyter-dir:PATH=None
    --cancel-unavail:TEXT=False
    --template_hash:HASH=None/template_hash_id
    --runtype:TEXT=None(sdk)
    --args:TEXT=None
    --query:QUERY=None
    --ssh:TEXT=False
    --jupyter:TEXT=False
    --direct:TEXT=False
    --max-price:USD=None
    --max-hours:HOURS=None
    --spot:TEXT=None
    --bid:USD=None
    --bid-over:PERCENT=None
    --tries:N=None
    --start-timeout:SECONDS=None
    --exclude-machine:MACHINE+=None
    --onstart:FILE=None(cli)
    --entrypoint:COMMAND=None(cli)
    --wait:TEXT=False
    --max-wait:SECONDS=600
    --confirm:TEXT=False
    -> CreatedInstance ONCE spends
run
    image:IMAGE
    command:COMMAND+
    --gpu:GPU=None
    --query:QUERY=None
    -o,--order:FIELDS=None
    --max-price:USD=None
    --max-hours:HOURS=None
    --spot:TEXT=None
    --bid:USD=None
    --bid-over:PERCENT=None
    --tries:N=None
    --start-timeout:SECONDS=None
    --exclude-machine:MACHINE+=None
    --disk:GB=10
    --env:ENV=None
    --login:TEXT=None
    --label:NAME=None
    --upload:LOCAL[:REMOTE]+=None
    --download:REMOTE[:LOCAL]+=None
    --keep:TEXT=False
    -i,--identity:FILE=None
    -> dict[str, Any] ONCE spends
show instances /show instances-v1
    -s,--status:STATE+=None
    --label:TEXT+=None
    --gpu-name:GPU+=None
    --verification:TEXT+{verified,unverified,deverified}=None
    --order-by:COLUMN+=None
    -l,--limit:N=None
    -t,--next-token:TOKEN=None
    -a,--all:TEXT=False
    -v,--verbose:TEXT=False(cli)
    -q,--quiet->ids_only:TEXT=False(cli)
    --cols:COLUMNS=None(cli)
    -> list[Instance]
show instances-v1 (sdk) params:JSON=None -> dict[str, Any]
show instance-filters (sdk) -> list[dict[str, Any]]
show instance id:INSTANCE/ID/INSTANCE_ID -> Instance | Any
start instance id:INSTANCE/ID --wait:TEXT=False --max-wait:SECONDS=600 -> dict[str, Any] spends
stop instance id:INSTANCE/ID --wait:TEXT=False --max-wait:SECONDS=600 -> dict[str, Any] sets
destroy instance
    id:INSTANCE/ID
    --wait:TEXT=False
    --max-wait:SECONDS=600
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] deletes asks
start instances ids:INSTANCE+ -> dict[str, Any] spends
stop instances ids:INSTANCE+ -> dict[str, Any] sets
destroy instances ids:INSTANCE+ -y,--yes:TEXT=False(cli) -> dict[str, Any] deletes asks
reboot instance
    id:INSTANCE/ID
    --wait:TEXT=False
    --max-wait:SECONDS=600
    --schedule:TEXT{HOURLY,DAILY,WEEKLY}=None
    --start_date:DATE=None
    --end_date:DATE=None
    --day:DAY='0'
    --hour:HOUR='0'
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE sets
recycle instance
    id:INSTANCE/ID
    --wait:TEXT=False
    --max-wait:SECONDS=600
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE sets asks(terminal)
label instance id:INSTANCE/ID label:TEXT -> dict[str, Any] sets
update instance
    id:INSTANCE/ID
    --template_id:ID=None
    --template_hash_id:HASH=None
    --image:IMAGE=None
    --args:TEXT=None
    --env:ENV=None
    --onstart:FILE=None
    -> dict[str, Any] sets
prepay instance id:INSTANCE/ID amount:USD -y,--yes:TEXT=False(cli) -> dict[str, Any] ONCE spends asks(terminal)
change bid
    id:INSTANCE/ID
    --price:USD=None
    --schedule:TEXT{HOURLY,DAILY,WEEKLY}=None
    --start_date:DATE=None
    --end_date:DATE=None
    --day:DAY='0'
    --hour:HOUR='0'
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] spends
execute
    id:INSTANCE/ID
    command:NAME/COMMAND
    --max-wait:SECONDS=60
    --schedule:TEXT{HOURLY,DAILY,WEEKLY}=None
    --start_date:DATE=None
    --end_date:DATE=None
    --day:DAY='0'
    --hour:HOUR='0'
    -y,--yes:TEXT=False(cli)
    -> str ONCE sets
logs
    instance_id:INSTANCE/id/ID/INSTANCE_ID
    --tail:N=None
    --filter:REGEX=None
    --daemon-logs:TEXT=False
    --max-wait:SECONDS=60
    -f,--follow:TEXT=False(cli)
    -> str
wait instance
    id:INSTANCE/ID
    --status:STATE{running,loading,exited,destroyed}='running'
    --max-wait:SECONDS=600
    --poll:SECONDS=5
    -> Instance
ssh (cli) id:INSTANCE/ID command:TEXT+=None -i,--identity:FILE=None -> None ONCE sets
scp (cli) source:PLACE target:PLACE -i,--identity:FILE=None -r,--recursive:TEXT=False -> None ONCE sets
ssh-url id:INSTANCE/ID --all:TEXT=False(cli) -> str
scp-url id:INSTANCE/ID --all:TEXT=False(cli) -> str
create template
    --name:TEXT=None
    --image:IMAGE=None
    --image_tag:NAME=None
    --href:URL=None
    --repo:REPO=None
    --login:TEXT=None
    --env:ENV=None
    --ssh:TEXT=False
    --jupyter:TEXT=False
    --direct:TEXT=False
    --jupyter-dir:PATH=None
    --jupyter-lab:TEXT=False
    --onstart-cmd:COMMAND=None
    --search_params:QUERY=None
    -n,--no-default:TEXT=False
    --disk_space:GB=None
    --readme:TEXT=None
    --hide-readme:TEXT=False
    --desc:TEXT=None
    --public:TEXT=False
    --runtype:TEXT=None(sdk)
    --use_ssh:TEXT=None(sdk)
    --jup_direct:TEXT=None(sdk)
    --ssh_direct:TEXT=None(sdk)
    --use_jupyter_lab:TEXT=None(sdk)
    --docker_login_repo:TEXT=None(sdk)
    --extra_filters:JSON=None(sdk)
    --readme_visible:TEXT=None(sdk)
    --private:TEXT=None(sdk)
    --docker_login_user:USER=None(sdk)
    --docker_login_pass:TEXT=None(sdk)
    --args_str:TEXT=None(sdk)
    --volume_info:JSON=None(sdk)
    -> dict[str, Any] ONCE sets
update template
    hash_id:HASH/HASH_ID
    --name:TEXT=None
    --image:IMAGE=None
    --image_tag:NAME=None
    --href:URL=None
    --repo:REPO=None
    --login:TEXT=None
    --env:ENV=None
    --ssh:TEXT=False
    --jupyter:TEXT=False
    --direct:TEXT=False
    --jupyter-dir:PATH=None
    --jupyter-lab:TEXT=False
    --onstart-cmd:COMMAND=None
    --search_params:QUERY=None
    -n,--no-default:TEXT=False
    --disk_space:GB=None
    --readme:TEXT=None
    --hide-readme:TEXT=False
    --desc:TEXT=None
    --public:TEXT=False
    --runtype:TEXT=None(sdk)
    --use_ssh:TEXT=None(sdk)
    --jup_direct:TEXT=None(sdk)
    --ssh_direct:TEXT=None(sdk)
    --use_jupyter_lab:TEXT=None(sdk)
    --docker_login_repo:TEXT=None(sdk)
    --extra_filters:JSON=None(sdk)
    --readme_visible:TEXT=None(sdk)
    --private:TEXT=None(sdk)
    --docker_login_user:USER=None(sdk)
    --docker_login_pass:TEXT=None(sdk)
    --args_str:TEXT=None(sdk)
    --volume_info:JSON=None(sdk)
    -> dict[str, Any] sets
delete template --template-id:ID=None --hash-id:HASH=None -> dict[str, Any] deletes
search volumes
    query:QUERY+=None|''
    -o,--order:FIELDS='score-'
    --limit:N=None
    --storage:GB=1.0
    -n,--no-default:TEXT=False
    -> list[dict[str, Any]]
search network-volumes
    query:QUERY+=None|''
    -o,--order:FIELDS='score-'
    --limit:N=None
    --storage:GB=1.0
    -n,--no-default:TEXT=False
    -> list[dict[str, Any]]
show volumes -t,--type:KIND{all,local,network}='all' -> list[Volume]
create volume id:OFFER -s,--size:GB=15 -n,--name:NAME=None -> dict[str, Any] ONCE spends
create network-volume id:OFFER -s,--size:GB=15 -n,--name:NAME=None -> dict[str, Any] ONCE spends
clone volume
    source:VOLUME
    dest:OFFER
    -s,--size:GB=None
    -d,--disable_compression:TEXT=False
    -> dict[str, Any] ONCE spends
delete volume id:VOLUME -y,--yes:TEXT=False(cli) -> dict[str, Any] deletes asks(terminal)
list volume id:MACHINE -s,--size:GB=15 -p,--price_disk:USD=0.1 -e,--end_date:DATE=None -> dict[str, Any] ONCE sets
list volumes ids:MACHINE+ -s,--size:GB=15 -p,--price_disk:USD=0.1 -e,--end_date:DATE=None -> dict[str, Any] ONCE sets
unlist volume id:OFFER -> dict[str, Any] sets
list network-volume
    disk_id:DISK
    -p,--price_disk:USD=0.15
    -s,--size:GB=15
    -e,--end_date:DATE=None
    -> dict[str, Any] ONCE sets
unlist network-volume id:OFFER -> dict[str, Any] sets
show network-disks -> dict[str, Any]
add network-disk machines:MACHINE+ mount_point:NAME -d,--disk_id:ID=None -> dict[str, Any] ONCE sets
copy src:PLACE dst:PLACE -i,--identity:FILE=None(cli) --exclude:PATTERN+=None(cli) -> dict[str, Any] ONCE sets
cancel copy dst->dst_id:INSTANCE/dst -> dict[str, Any] sets
cancel sync dst->dst_id:INSTANCE/dst -> dict[str, Any] sets
cloud copy
    --src:PATH
    --dst:PATH='/workspace'
    --instance:INSTANCE=None
    --connection:ID=None
    --transfer:TEXT='Instance to Cloud'
    --dry-run:TEXT=False
    --size-only:TEXT=False
    --ignore-existing:TEXT=False
    --update:TEXT=False
    --delete-excluded:TEXT=False
    --flags:TEXT+=None(sdk)
    --schedule:TEXT{HOURLY,DAILY,WEEKLY}=None
    --start_date:DATE=None
    --end_date:DATE=None
    --day:DAY='0'
    --hour:HOUR='0'
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE sets
show connections -> list[dict[str, Any]]
take snapshot
    instance_id:INSTANCE/id
    --repo:REPO=None
    --container_registry:NAME='docker.io'
    --docker_login_user:USER=None
    --docker_login_pass:TEXT=None
    --pause:true|false=True
    -> dict[str, Any] ONCE spends
show instance-backups --contract-id:INSTANCE=None -> list[dict[str, Any]]
show instance-backup-files /instance_backup_files() contract_id:INSTANCE -> dict[str, Any]
show deployments -> list[dict[str, Any]]
show deployment id:DEPLOYMENT -> dict[str, Any] | Any
show deployment-versions id:DEPLOYMENT -> list[dict[str, Any]]
start deployment id:DEPLOYMENT -> dict[str, Any] spends
stop deployment id:DEPLOYMENT -> dict[str, Any] sets
delete deployment id:DEPLOYMENT=None --name:NAME=None --tag:TEXT=None -> dict[str, Any] deletes
show pending-price-increases -> dict[str, Any]
accept price-increase
    ids:INSTANCE+(cli)
    instance_id:INSTANCE(sdk)
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE spends asks
reject price-increase
    ids:INSTANCE+(cli)
    instance_id:INSTANCE(sdk)
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE sets asks
search benchmarks
    query:QUERY+=None|''
    -o,--order:FIELDS=None
    -l,--limit:N=None
    -t,--next-token->after_token:TOKEN=None/next_token
    -a,--all->all_pages:TEXT=False
    -> list[dict[str, Any]]
search benchmarks-v1 (sdk) params:JSON=None -> dict[str, Any]
show gpu-metrics /metrics gpu
    --verified:TEXT{true,false,all}='all'
    --datacenter:TEXT{true,false,all}='all'
    --num-gpus:N{all,1,2,4,8,other}='all'
    -> dict[str, Any]
show gpu-trends /metrics gpu-trends
    name:NAME='RTX 5090,RTX 4090,RTX 3090'
    --verified:TEXT{true,false,all}='all'
    --datacenter:TEXT{true,false,all}='all'
    --num-gpus:N{all,1,2,4,8,other}='all'
    --start:DATE=None
    --end:DATE=None
    --step:SECONDS=None
    -> dict[str, Any]
show gpu-locations /metrics gpu-locations
    --verified:TEXT{true,false,all}='all'
    --datacenter:TEXT{true,false,all}='all'
    --rented:TEXT{true,false,all}='all'
    --state:TEXT{all,rented,available,unavailable}='all'
    --gpu:GPU=None
    -> dict[str, Any]
set api-key new_api_key->api_key:API-KEY=None/new_api_key -> None sets
show ssh-keys -> list[dict[str, Any]]
create ssh-key ssh_key:KEY=None -y,--yes:TEXT=False(cli) --name:TEXT=None(sdk) -> dict[str, Any] ONCE sets
attach ssh instance_id:INSTANCE/id ssh_key:KEY -> dict[str, Any] sets
show instance-ssh-keys id:INSTANCE/ID/instance_id/INSTANCE_ID -> list[dict[str, Any]]
detach ssh instance_id:INSTANCE/id ssh_key_id:KEY -> dict[str, Any] sets
update ssh-key id:KEY/ssh_key_id ssh_key:KEY -> dict[str, Any] sets
delete ssh-key id:KEY/ssh_key_id -> dict[str, Any] deletes
show api-keys -> list[dict[str, Any]]
show api-key id:KEY -> dict[str, Any]
create api-key
    --name:NAME
    --permission_file->permissions:FILE=None/permission_file
    --key_params:JSON=None
    -> dict[str, Any] ONCE sets
delete api-key id:KEY -y,--yes:TEXT=False(cli) -> dict[str, Any] deletes asks(terminal)
reset api-key -y,--yes:TEXT=False(cli) -> dict[str, Any] ONCE sets asks(terminal)
set role role:TEXT{host,client} -> None sets
show env-vars -s,--show-values:TEXT=False -> dict[str, Any] | Any
create env-var name:NAME value:TEXT -> dict[str, Any] ONCE sets
update env-var name:NAME value:TEXT -> dict[str, Any] sets
delete env-var name:NAME -> dict[str, Any] deletes
tfa login
    -c,--code:CODE=None
    -bc,--backup-code:CODE=None
    -t,--method-type:TEXT{email,sms,totp}=None
    -s,--secret:CODE=None
    -id,--method-id:ID=None
    -> dict[str, Any] ONCE sets
tfa logout -> dict[str, Any] sets
tfa status -> dict[str, Any]
tfa auth-new
    -c,--code:CODE=None
    -s,--secret:CODE=None
    -bc,--backup-code:CODE=None
    -t,--method-type:TEXT{email,sms,totp}=None
    -id,--method-id:ID=None
    -> dict[str, Any] ONCE sets
tfa totp-setup -> dict[str, Any] ONCE sets
tfa send-sms -p,--phone-number:NUMBER=None -> dict[str, Any] ONCE sets
tfa resend-sms -s,--secret:CODE -p,--phone-number:NUMBER=None -> dict[str, Any] ONCE sets
tfa send-email -> dict[str, Any] ONCE sets
tfa activate
    code:NAME
    --secret:CODE
    -t,--method-type:TEXT{sms,totp}='totp'
    --phone-number:NUMBER=None
    -l,--label:NAME=None
    --method-id:ID=None(sdk)
    -> dict[str, Any] ONCE sets
tfa update method_id:METHOD -l,--label:NAME=None -p,--set-primary:true|false=None -> dict[str, Any] sets
tfa delete
    -c,--code:CODE=None
    -bc,--backup-code:CODE=None
    -t,--method-type:TEXT{email,sms,totp}=None
    -s,--secret:CODE=None
    --method-id:ID=None
    -id,--id-to-delete:ID=None
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE deletes asks
tfa regen-codes
    -c,--code:CODE=None
    -bc,--backup-code:CODE=None
    -t,--method-type:TEXT{email,sms,totp}=None
    -s,--secret:CODE=None
    -id,--method-id:ID=None
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE sets asks
create team --team-name:NAME --transfer-credit:USD=0 -> dict[str, Any] ONCE spends
destroy team -y,--yes:TEXT=False(cli) -> dict[str, Any] deletes asks(terminal)
show members /show team-members /show_team_members() -> list[dict[str, Any]]
invite member /invite team-member /invite_team_member() --email:EMAIL --role:NAME -> dict[str, Any] ONCE sets
remove member /remove team-member /remove_team_member() id:MEMBER/ID -> dict[str, Any] deletes
show team-roles -> list[dict[str, Any]]
show team-role name:NAME/NAME -> dict[str, Any]
create team-role --name:NAME/NAME --permissions:FILE -> dict[str, Any] ONCE sets
update team-role id:ROLE/ID --name:NAME=None --permissions:FILE=None -> dict[str, Any] sets
remove team-role name:NAME/NAME -> dict[str, Any] deletes
show machines -> list[Machine]
show machine id:MACHINE/Machine/machine_id -> Machine
list machine
    id:MACHINE/machine_id
    -g,--price_gpu:USD=None
    -s,--price_disk:USD=None
    -u,--price_inetu:USD=None
    -d,--price_inetd:USD=None
    -b,--price_min_bid:USD=None
    -m,--min_chunk:N=1
    -e,--end_date:DATE=None
    -r,--discount_rate:N=None
    -l,--duration:SPAN=None
    -v,--vol_size:GB=None
    -z,--vol_price:USD=None
    -> dict[str, Any] sets
list machines
    ids:MACHINE+
    -g,--price_gpu:USD=None
    -s,--price_disk:USD=None
    -u,--price_inetu:USD=None
    -d,--price_inetd:USD=None
    -b,--price_min_bid:USD=None
    -m,--min_chunk:N=1
    -e,--end_date:DATE=None
    -r,--discount_rate:N=None
    -l,--duration:SPAN=None
    -v,--vol_size:GB=None
    -z,--vol_price:USD=None
    -> list[dict[str, Any]] sets
unlist machine id:MACHINE/machine_id -> dict[str, Any] sets
delete machine id:MACHINE/machine_id -> dict[str, Any] deletes
cleanup machine id:MACHINE/machine_id -> dict[str, Any] deletes
defrag machines ids:MACHINE+/IDs/machine_ids -> dict[str, Any] sets
set min-bid id:MACHINE/machine_id --price:USD=None -> dict[str, Any] sets
set defjob
    id:MACHINE/machine_id
    --price_gpu:USD=None
    --price_inetu:USD=None
    --price_inetd:USD=None
    --image:IMAGE=None
    --args:TEXT=None
    -> dict[str, Any] sets
remove defjob id:MACHINE/machine_id -> dict[str, Any] deletes
show maints -i,--ids:MACHINE/machine_ids -> list[dict[str, Any]]
schedule maint
    id:MACHINE/machine_id
    --sdate:DATE
    --duration:HOURS
    --maintenance_category->category:TEXT='not provided'/maintenance_category
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE sets asks
cancel maint id:MACHINE/machine_id -y,--yes:TEXT=False(cli) -> dict[str, Any] sets asks
reports id:MACHINE/machine_id -> list[dict[str, Any]]
show clusters -> dict[str, Any]
create cluster subnet:NAME manager_id:MACHINE -> dict[str, Any] ONCE sets
delete cluster cluster_id:CLUSTER/id -> dict[str, Any] deletes
join cluster cluster_id:CLUSTER/id machine_ids:MACHINE+ -> dict[str, Any] sets
remove-machine-from-cluster cluster_id:CLUSTER machine_id:MACHINE new_manager_id:MACHINE=None -> dict[str, Any] sets
show overlays -> list[dict[str, Any]]
create overlay cluster_id:CLUSTER name:NAME -> dict[str, Any] ONCE sets
join overlay name:NAME instance_id:INSTANCE/INSTANCE_ID -> dict[str, Any] sets
delete overlay overlay_identifier:OVERLAY/overlay_id/overlay_name -> dict[str, Any] deletes
show user -> User
cost -> Cost
show audit-logs -> list[dict[str, Any]]
set user --file->params:FILE/file -> dict[str, Any] sets
show subaccounts -> list[dict[str, Any]]
create subaccount --email:EMAIL --username:USER --password:PASSWORD --type:KIND=None -> dict[str, Any] ONCE sets
show ipaddrs -> list[dict[str, Any]]
show invoices
    -s,--start_date:DATE=None
    -e,--end_date:DATE=None
    -c,--only_charges:TEXT=False
    -p,--only_credits:TEXT=False
    --instance_label:NAME=None(cli)
    --pdf:FILE=None
    -> dict[str, Any]
show invoices-v1
    -i,--invoices:TEXT=False(cli)
    -c,--charges:TEXT=False
    -s,--start-date:DATE=None
    -e,--end-date:DATE=None
    -l,--limit:N=20
    -t,--next-token:TOKEN=None
    --latest-first:TEXT=False
    -ct,--charge-type:TEXT+{instance,volume,serverless,i,v,s}=None
    -f,--format:SHAPE{table,tree}='table'
    -it,--invoice-type:TEXT+{transfers,stripe,bitpay,coinbase,crypto.com,reserved,payout_paypal,payout_wise}=None
    -v,--verbose:TEXT=False(cli)
    --pdf:FILE=None
    -> dict[str, Any]
generate pdf-invoices (sdk)
    -s,--start_date:DATE=None
    -e,--end_date:DATE=None
    -c,--only_charges:TEXT=False
    -p,--only_credits:TEXT=False
    --pdf:FILE=None
    -> str sets
search invoices query:QUERY+=None|'' -> list[Invoice]
show earnings
    -s,--start_date:DATE=None
    -e,--end_date:DATE=None
    -m,--machine_id:MACHINE=None
    -q,--quiet:TEXT=False(cli)
    --last_days:N=None
    --user_id:ID='me'
    -> dict[str, Any]
show deposit id:INSTANCE/Id/ID -q,--quiet:TEXT=False(cli) -> dict[str, Any]
transfer credit
    recipient->recipient_pos:ACCOUNT=None(cli)
    amount->amount_pos:USD=None(cli)
    -r,--recipient:ACCOUNT|None
    -a,--amount:USD|None
    --skip:TEXT=False(cli)
    -y,--yes:TEXT=False(cli)
    -> dict[str, Any] ONCE spends asks
fetch contracts (sdk) label:TEXT=None contract_ids:ID=None -> list[dict[str, Any]]
show scheduled-jobs -> list[dict[str, Any]]
delete scheduled-job id:JOB -> dict[str, Any] deletes
create scheduled-job (sdk)
    start_time:DATE
    end_time:DATE
    api_endpoint:NAME
    request_method:NAME
    request_body:JSON
    frequency:NAME
    instance_id:INSTANCE
    day_of_the_week:N=None
    hour_of_the_day:N=None
    -> dict[str, Any] ONCE spends
update scheduled-job (sdk)
    id:JOB
    request_body:JSON
    start_time:DATE=None
    end_time:DATE=None
    api_endpoint:TEXT=None
    request_method:TEXT=None
    frequency:TEXT=None
    instance_id:INSTANCE=None
    day_of_the_week:N=None
    hour_of_the_day:N=None
    -> dict[str, Any] spends
show endpoints -> list[EndpointRow]
create endpoint
    --min_load:N=0.0
    --min_cold_load:N=0.0
    --target_util:N=0.9
    --cold_mult:N=2.5
    --cold_workers:N=5
    --max_workers:N=20
    --endpoint_name:TEXT=None
    --max_queue_time:SECONDS=None
    --target_queue_time:SECONDS=None
    --inactivity_timeout:SECONDS=None
    --auto_instance:TEXT='prod'
    -> dict[str, Any] ONCE spends
update endpoint
    id:ENDPOINT
    --min_load:N=None
    --min_cold_load:N=None
    --target_util:N=None
    --cold_mult:N=None
    --cold_workers:N=None
    --max_workers:N=None
    --endpoint_name:TEXT=None
    --max_queue_time:SECONDS=None
    --target_queue_time:SECONDS=None
    --inactivity_timeout:SECONDS=None
    --auto_instance:TEXT='prod'
    --endpoint_state:TEXT{active,suspended,stopped}=None
    -> dict[str, Any] spends
delete endpoint id:ENDPOINT -y,--yes:TEXT=False(cli) -> dict[str, Any] deletes asks(terminal)
get endpt-logs id:ENDPOINT=None --level:N{0,1,2,3}=1 --tail:N=None --endpoint:NAME=None -> dict[str, Any]
get endpt-workers /get_endpoint_workers() id:ENDPOINT -> list[dict[str, Any]]
show workergroups /show_autogroups() /show_autoscalers() -> list[Workergroup]
create workergroup /create_autogroup() /create_autoscaler()
    --template_hash:HASH=None
    --template_id:ID=None
    --search_params:QUERY=None
    --launch_args:TEXT=None
    --endpoint_name:TEXT=None
    --endpoint_id:ENDPOINT=None
    --gpu_ram:GB=None
    -n,--no-default:TEXT=False
    --min_load:N=None
    --target_util:N=None
    --cold_mult:N=None
    --cold_workers:N=None
    --max_workers:N=None
    --test_workers:N=None
    --auto_instance:TEXT='prod'
    -> dict[str, Any] ONCE spends
update workergroup /update_autogroup() /update_autoscaler()
    id:WORKERGROUP
    --template_hash:HASH=None
    --template_id:ID=None
    --search_params:QUERY=None
    --launch_args:TEXT=None
    --endpoint_name:TEXT=None
    --endpoint_id:ENDPOINT=None
    --gpu_ram:GB=None
    -n,--no-default:TEXT=False
    --min_load:N=None
    --target_util:N=None
    --cold_mult:N=None
    --cold_workers:N=None
    --max_workers:N=None
    --test_workers:N=None
    -> dict[str, Any] spends
delete workergroup /delete_autogroup() /delete_autoscaler() id:WORKERGROUP -> dict[str, Any] deletes
get wrkgrp-logs id:WORKERGROUP --level:N{0,1,2,3}=1 --tail:N=None -> dict[str, Any]
get wrkgrp-workers /get_workergroup_workers() id:WORKERGROUP -> list[dict[str, Any]]
update workers id:WORKERGROUP --cancel:TEXT=False -> dict[str, Any] ONCE sets
route endpoint:NAME cost:N -> dict[str, Any] ONCE sets
request
    endpoint:NAME
    route:NAME
    --json->payload:JSON=None
    stdin:TEXT{-}=None(cli)
    --file:FILE=None(cli)
    --cost:N=100
    --stream:TEXT=False
    --timeout:SECONDS=None|600.0
    --worker-timeout:SECONDS=600.0
    retry:TEXT=True(sdk)
    --no-retry:TEXT=False(cli)
    --max-retries:N=None
    --text:TEXT=False(cli)
    --out:FILE=None(cli)
    -> Any ONCE spends
show notification-types -> list[dict[str, Any]]
show notifications --user_id:ID=None -> dict[str, Any] | Any
set notifications notification_preferences:JSON --user_id:ID=None -> dict[str, Any] | Any sets
show webhooks -> list[dict[str, Any]]
create webhook webhook_url:NAME event_types:TEXT+ --name:TEXT=None -> dict[str, Any] ONCE sets
update webhook id:WEBHOOK --webhook_url:URL=None --event_types:TEXT+=None --name:TEXT=None -> dict[str, Any] sets
delete webhook id:WEBHOOK -> dict[str, Any] deletes
rotate webhook-secret id:WEBHOOK -> dict[str, Any] ONCE sets
test webhook id:WEBHOOK -> dict[str, Any] ONCE sets
self-test machine
    machine_id:MACHINE/id
    --debugging:TEXT=False
    --ignore-requirements:TEXT=False
    --test-image:IMAGE=None
    --support-bundle-dir:PATH=None
    --no-support-bundle:TEXT=False
    -> dict[str, Any] ONCE spends
dump-logs
    machine_id:MACHINE
    --instance-id:INSTANCE=None
    --output-dir:PATH='/tmp'
    --include-local-host-artifacts:TEXT=False
    -> dict[str, Any]
run benchmarks
    --template_hash:HASH=None
    --template_id:ID=None
    --gpus:GPUS=None
    --num_gpus:N=None
    --timeout:SECONDS=1800
    --no-cache:TEXT=False
    --auto_instance:TEXT=None
    --autoscaler_url:TEXT=None
    -y,--yes:TEXT=False(cli)
    -> list[dict[str, Any]] ONCE spends asks
update (cli) --check:TEXT=False -> None
uninstall (cli) -y,--yes:TEXT=False(cli) -> None sets asks
help (cli) command:TEXT+=None -> dict[str, Any]
repl (cli) -> None sets
completion (cli) shell:TEXT{bash,zsh,fish} -> str
'''
# surface: end


# ==================================================================================================
# 5. BENCHMARK
# ==================================================================================================

# ---------------------------------------------------------- programs that are measured, and servers

FLOOR_REQUEST = """
import http.client, json
connection = http.client.HTTPConnection("127.0.0.1", {port})
connection.request("GET", "/api/v1/instances/?limit=25", headers={{"Authorization": "Bearer bench-key"}})
print(json.dumps(json.loads(connection.getresponse().read())["instances"], indent=1, sort_keys=True))
"""
FLOOR_SEARCH = """
import http.client, json
connection = http.client.HTTPConnection("127.0.0.1", {port})
connection.request("POST", "/api/v0/bundles/", "{{}}", headers={{"Authorization": "Bearer bench-key"}})
rows = json.loads(connection.getresponse().read())["offers"]
{show}
"""
FLOOR_JSON = "print(json.dumps(rows, indent=1, sort_keys=True))"
FLOOR_TABLE = """
for row in rows:
    print(*[row.get(name) for name in {names!r}])
"""
CALLS = """
import json, statistics, sys, time
{setup}
times = []
for _ in range(300):
    began = time.perf_counter()
    call()
    times.append(time.perf_counter() - began)
print(statistics.median(times[20:]))
"""
FLOOR_CALL = """
import http.client
connection = http.client.HTTPConnection("127.0.0.1", {port})
def call():
    connection.request("GET", "/api/v1/instances/?limit=25", headers={{"Authorization": "Bearer bench-key"}})
    return json.loads(connection.getresponse().read())
"""
OUR_CALL = """
from vastai import VastAI
client = VastAI("bench-key", "http://127.0.0.1:{port}")
call = lambda: client.show_instances_v1({{"limit": 25}})
"""
THREADED = """
import concurrent.futures, time
from vastai import VastAI
client = VastAI("bench-key", "http://127.0.0.1:{port}")
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    began = time.perf_counter()
    list(pool.map(lambda _: client.show_instances_v1({{"limit": 25}}), range(200)))
    print(time.perf_counter() - began)
"""


SECURE = """
import time
from vastai import VastAI
def seconds(client):
    began = time.perf_counter()
    client.show_instances_v1({{"limit": 25}})
    return time.perf_counter() - began
client, other = (VastAI("bench-key", "https://127.0.0.1:{port}") for _ in range(2))
print(*[seconds(client), seconds(client), seconds(other)][{which}:{which} + 1])
"""


SERVERLESS = """
import asyncio, time
from vastai import Serverless
URL, COUNT, AT_ONCE, STREAM = {url!r}, {count}, {at_once}, {stream}
async def main():
    Serverless.SSL_CERT_URL = URL + "/static/root.cer"
    async with Serverless("bench-key", autoscaler_url=URL, webserver_url=URL) as client:
        endpoint = await client.get_endpoint({scheme!r})
        async def work(todo):
            for _ in todo:
                answer = await endpoint.request("/work", {{"stream": STREAM}}, cost=8, stream=STREAM)
                if STREAM:
                    async for event in answer["response"]:
                        pass
        await asyncio.gather(*(work(range(1)) for _ in range(AT_ONCE)))
        began, busy, todo = time.perf_counter(), time.process_time(), iter(range(COUNT))
        await asyncio.gather(*(work(todo) for _ in range(AT_ONCE)))
        if {timed}:
            print(COUNT / (time.perf_counter() - began), (time.process_time() - busy) * 1000 / COUNT)
asyncio.run(main())
"""


class CannedServerless(asyncio.Protocol):
    """Console, router and worker of canned answers, much faster than a client."""

    answers = {}  # {path: bytes}
    buffer = b""

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.buffer += data
        while b"\r\n\r\n" in self.buffer:
            head, _, rest = self.buffer.partition(b"\r\n\r\n")
            length = int(re.search(rb"(?i)content-length: *(\d+)|$", head).group(1) or 0)
            if len(rest) < length:
                return
            self.buffer = rest[length:]
            path = head.split(b" ", 2)[1].decode().partition("?")[0]
            name = re.search(rb'"endpoint": *"(\w+)"', rest[:length]) if path == "/route/" else None
            stream = b'"stream": true' in rest[:length]
            self.transport.write(self.answers[name.group(1).decode() if name else "/stream" if stream else path])

    @classmethod
    def begin(cls, context):
        """Serves http and https on loopback ports, in a thread of their own; returns the address of the first."""
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def serve():
            ports = {}
            for scheme, tls in (("http", None), ("https", context)):
                server = await loop.create_server(cls, "127.0.0.1", 0, ssl=tls, backlog=512)
                ports[scheme] = server.sockets[0].getsockname()[1]
                grant = {"endpoint": scheme, "url": f"{scheme}://127.0.0.1:{ports[scheme]}", "cost": 8, "reqnum": 1,
                         "request_idx": 1, "signature": "c2ln"}
                cls.answers[scheme] = reply(grant, Content_Type="application/json")
            rows = [dict(ENDPOINT, endpoint_name=name) for name in ports]
            cls.answers.update({
                "/api/v0/endptjobs/": reply({"success": True, "results": rows}, Content_Type="application/json"),
                "/static/root.cer": reply(pem("CERTIFICATE", CERTIFICATE)),
                "/work": reply({"choices": [{"text": " Paris"}]}, Content_Type="application/json"),
                "/stream": chunked(*map(event, EVENTS * 100))})
            cls.url = f"http://127.0.0.1:{ports['http']}"
            ready.set()

        asyncio.set_event_loop(loop)
        threading.Thread(target=lambda: (loop.run_until_complete(serve()), loop.run_forever()), daemon=True).start()
        ready.wait()
        return cls.url


class BenchHandler(http.server.BaseHTTPRequestHandler):
    """Canned answers, as fast as the standard library sends them: instances, or 5,000 offers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        time.sleep(self.server.delay)
        data = self.server.offers if "bundles" in self.path else self.server.instances
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                         % (len(data), data))

    do_POST = do_PUT = do_GET


class BenchServer(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, delay=0.0, context=None):
        super().__init__(("127.0.0.1", 0), BenchHandler)
        self.delay = delay
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        with Sandbox() as box:
            client = vastai.VastAI(box.key, box.url)
            rows, offers = client.show_instances(), client.search_offers()
        self.instances = json.dumps({"success": True, "instances": rows, "next_token": None}).encode()
        self.offers = json.dumps({"offers": [dict(offers[i % len(offers)], id=10**7 + i) for i in range(5000)]}).encode()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def port(self):
        return self.server_address[1]


LAUNCHER = """
import os, sys
null = os.open(os.devnull, os.O_WRONLY)
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ,
                                           file_actions=[(os.POSIX_SPAWN_DUP2, null, 1), (os.POSIX_SPAWN_DUP2, null, 2)]), 0)
print(usage.ru_maxrss / 1024)
sys.exit(status != 0)
"""


# ---------------------------------------------------------------------------------------- measuring

# {line: requests that the official client, 1.9.1, sends for it with its output in a pipe}
REQUESTS = {
    "show instances": 2, "show instances --raw": 1, "show instance {running}": 1, "ssh-url {running}": 1,
    "search offers 'num_gpus=1'": 1, "search offers --raw": 1, "search templates": 1, "show user": 1,
    "create instance {offer} --image i": 1, "launch instance -g RTX_4090 -n 1 -i i": 1, "start instance {stopped}": 1,
    "stop instance {running}": 1, "label instance {running} x": 1, "change bid {running} --price 0.5": 1,
    "destroy instance {stopped} -y": 1, "logs {running} --tail 3": 2, "copy {running}:/a {stopped}:/b": 1,
    "show invoices-v1 -c": 1, "show endpoints": 1, "show machines": 1, "show env-vars": 1,
}
OFFICIAL_ALSO = "/api/v0/gpu_names/unique/"  # which it fetches at its start and keeps for a day: not counted


class Bench:
    """Runs commands of several programs in turns, each in a folder of its own, and prints what they took.

    `folders` is {who: folder in which `import vastai` finds that program's module}: ours, an earlier file's ("before"),
    the official client's, for which any folder without a vastai.py does.
    """

    def __init__(self, runs, env, folders):
        self.runs, self.env, self.folders, self.results = runs, env, folders, []

    def run(self, who, command):
        """(seconds, what it printed) of one process."""
        began = time.perf_counter()
        done = subprocess.run(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              cwd=self.folders.get(who, self.folders["ours"]), check=True)
        return time.perf_counter() - began, done.stdout

    def can(self, who, command):
        """Whether that program does it at all: an earlier one may know less."""
        try:
            self.run(who, command)
        except subprocess.CalledProcessError:
            return False
        return True

    def row(self, what, unit, most, commands, read):
        """Measures {who: command} in turns; `read` makes a figure of what `run` returns, `most` is the target."""
        commands = {who: command for who, command in commands.items() if command}
        if "before" in self.folders and self.can("before", commands["ours"]):
            commands["before"] = commands["ours"]
        figures = {who: [] for who in commands}
        for _ in range(self.runs):
            for who, command in commands.items():
                figures[who].append(read(self.run(who, command)))
        self.results.append({"what": what, "unit": unit, "target": most, "figures": figures})
        print(f"{what}   (at most {most})" if most else what)
        middle = {who: statistics.median(values) for who, values in figures.items()}
        base = next(who for who in (most.rpartition(" ")[2], "floor", "ours") if who in middle)
        for who, values in figures.items():
            print(f"    {who:<9} median {middle[who]:9.2f} {unit:<3}  min {min(values):9.2f}  max {max(values):9.2f}"
                  f"  {middle[who] / middle[base]:6.2f} x {base}", flush=True)

    def pair(self, what, commands):
        """Measures commands that print two figures: requests a second, and ms of CPU a request."""
        runs = {who: [] for who, command in commands.items() if command}
        for _ in range(min(self.runs, 5)):
            for who in runs:
                runs[who].append([float(figure) for figure in self.run(who, commands[who])[1].split()])
        print(what)
        for who, values in runs.items():
            rates, busy = zip(*values)
            self.results.append({"what": what, "unit": "requests/s, CPU ms", "who": who, "figures": values})
            print(f"    {who:<9} best {max(rates):8.0f} a second, median {statistics.median(rates):8.0f};"
                  f"  CPU {statistics.median(busy):6.2f} ms a request", flush=True)


def bench_rows(measure, python, official, port, slow, secure):
    """All rows of times and memory."""
    def milliseconds(run):
        return run[0] * 1000

    def printed(run):
        return float(run[1]) * 1000

    def mebibytes(run):
        return float(run[1])

    def official_cli(*words):
        return official and [os.path.join(official, "bin", "vastai"), "--url", f"http://127.0.0.1:{port}", *words]

    def official_code(code):
        return official and [os.path.join(official, "bin", "python"), "-c", code]

    # What .pth files of this machine's site-packages load would count for both, and hide what ours takes.
    bare = [python, "-S"]
    ours, plain = [*bare, "-m", "vastai"], [*bare, "-c", "pass"]
    script = [*bare, "-c", "import sys; sys.argv[1:] = ['--version']; from vastai import program; program()"]
    process = {"floor": [*bare, "-c", FLOOR_REQUEST.format(port=port)], "ours": [*ours, "show", "instances", "--raw"],
               "official": official_cli("show", "instances", "--raw")}
    call = (f"from vastai import VastAI\nclient = VastAI('bench-key', 'http://127.0.0.1:{port}')\n"
            "call = lambda: client.show_instances_v1({'limit': 25})")

    measure("show instances --raw, process", "ms", "1.05 x floor", process, milliseconds)
    # A child's peak counts from its parent's size: a small process starts the one that is measured.
    measure("  its peak memory", "MiB", "1.12 x floor", {
        who: command and [python, "-ISc", LAUNCHER, *command] for who, command in process.items()}, mebibytes)
    measure("--version, vastai script", "ms", "1.35 x floor", {
        "floor": plain, "ours": script, "official": official_cli("--version")}, milliseconds)
    measure("--version, python -m", "ms", "", {
        "floor": [*bare, "-m", "empty"], "ours": [*ours, "--version"]}, milliseconds)
    measure("--version, python vastai.py, compiled each time", "ms", "0.7 x before", {
        "floor": plain, "ours": [*bare, "vastai.py", "--version"]}, milliseconds)
    measure("--help, python -m", "ms", "1.35 x floor", {
        "floor": plain, "ours": [*ours, "--help"], "official": official_cli("--help")}, milliseconds)
    measure("from vastai import VastAI; the floor is import json, http.client", "ms", "0.6 x floor", {
        "floor": [*bare, "-c", "import json, http.client"], "ours": [*bare, "-c", "from vastai import VastAI"],
        "official": official_code("from vastai import VastAI")}, milliseconds)
    measure("one call, kept-alive", "ms", "1.25 x floor", {
        "floor": [python, "-c", CALLS.format(setup=FLOOR_CALL.format(port=port))],
        "ours": [python, "-c", CALLS.format(setup=OUR_CALL.format(port=port))],
        "official": official_code(CALLS.format(setup=call))}, printed)
    measure("200 calls, 16 threads, 50 ms each; the ideal is 13 rounds", "ms", "1.04 x ideal", {
        "ideal": [python, "-c", f"print({-(-200 // 16) * 0.05})"], "ours": [python, "-c", THREADED.format(port=slow)],
        "official": official_code(THREADED.format(port=slow))}, printed)
    for which, what in enumerate(("first call, with the TLS context", "next call, kept-alive", "another client")):
        measure(f"https: {what}", "ms", "", {
            "ours": [python, "-c", SECURE.format(port=secure, which=which)]}, printed)
    table = FLOOR_TABLE.format(names=[column[1] for column in vastai.OFFER_COLUMNS])
    for what, words, show, most in (("table", [], table, 0.17), ("JSON", ["--raw"], FLOOR_JSON, 0.2)):
        measure(f"search offers, 5,000 rows, {what}", "ms", f"{most:.2f} x official", {
            "floor": [python, "-c", FLOOR_SEARCH.format(port=port, show=show)],
            "ours": [python, "-m", "vastai", "search", "offers", *words], "official": official_cli("search", "offers", *words)},
            milliseconds)


def serverless_rows(measured, python, official, url):
    """Requests to endpoints, beside the official client."""
    def commands(**values):
        code = SERVERLESS.format(**{"url": url, "scheme": "http", "stream": False, "timed": True, **values})
        return {"ours": [python, "-c", code], "official": official and [os.path.join(official, "bin", "python"), "-c", code]}

    for scheme in ("http", "https"):
        for at_once, count in ((1, 500), (16, 2000), (256, 2000)):
            measured.pair(f"serverless over {scheme}, {at_once} at once",
                          commands(scheme=scheme, at_once=at_once, count=count))
    measured.pair("serverless, streams of 200 events, 16 at once", commands(stream=True, at_once=16, count=160))
    measured.row("serverless: a whole program with one request", "ms", "", commands(at_once=1, count=0, timed=False),
                 lambda run: run[0] * 1000)


def count_requests(measured, python, official):
    """How many requests a command sends; the official client's count is pinned unless it is there to be run."""
    print("requests of a command, its output in a pipe")
    counts = {}
    for line, pinned in REQUESTS.items():
        commands = {"ours": [python, "-m", "vastai"]}
        if official:
            commands["official"] = [os.path.join(official, "bin", "vastai")]
        found = {"official": pinned}
        for who, command in commands.items():
            with Sandbox(boot=0) as box:
                running, stopped = list(box.market.tables["instances"])[:2]
                words = shlex.split(line.format(running=running, stopped=stopped, offer=box.offer()["id"]))
                address = ["--url", box.url] if who == "official" else []
                env = dict(measured.env, VAST_URL=box.url, VAST_API_KEY=box.key)
                subprocess.run([*command, *address, *words], env=env, cwd=measured.folders[who], input=b"",
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
                found[who] = sum(request["path"] != OFFICIAL_ALSO for request in box.requests)
        counts[line] = found
        print(f"    {line:<50} ours {found['ours']}   official {found['official']}", flush=True)
    return counts


def bench(arguments):
    """Measure start-up, memory, calls, rendering and requests, in turns with floors; asserts nothing."""
    parser = argparse.ArgumentParser(prog="test_vastai.py bench", description=bench.__doc__)
    parser.add_argument("--runs", type=int, default=11, help="runs of each command (11)")
    parser.add_argument("--before", metavar="FILE", help="an earlier vastai.py to compare with")
    parser.add_argument("--official", metavar="VENV", help="virtual environment with the official client")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    sources = {"ours": os.path.join(HERE, "vastai.py"), **({"before": options.before} if options.before else {})}
    with temporary_folder() as home:
        fast, slow, secure = BenchServer(), BenchServer(0.05), BenchServer(context=server_context(home))
        # Nothing of the caller's counts: neither settings of Python, nor bytecode, nor the folder where this starts.
        env = {name: value for name, value in os.environ.items() if not name.startswith(("VAST", "PYTHON", "XDG_"))}
        env.update(HOME=home, VAST_URL=f"http://127.0.0.1:{fast.port}", VAST_API_KEY="bench-key",
                   VASTAI_NO_UPDATE_CHECK="1", REQUESTS_CA_BUNDLE=os.path.join(home, "ca.pem"))
        folders = {"official": os.sep}  # where it finds its own module, not ours
        for who, source in sources.items():
            folders[who] = os.path.join(home, who)
            os.mkdir(folders[who])
            shutil.copy(source, os.path.join(folders[who], "vastai.py"))
            with open(os.path.join(folders[who], "empty.py"), "w"):
                pass
            subprocess.run([sys.executable, "-c", "import vastai, empty"], env=env, cwd=folders[who], check=True)
        print(f"CPython {sys.version.split()[0]} on {os.cpu_count()} processors, {options.runs} runs each, in turns.\n"
              "floor: the least program on the standard library that does the same")
        for who, source in sources.items():
            print(f"{who}: {os.path.abspath(source)}, {os.path.getsize(source):,} bytes")
        print("official: " + (options.official or "not measured (--official VENV); its requests as counted once"))
        measured = Bench(options.runs, env, folders)
        bench_rows(measured.row, sys.executable, options.official, fast.port, slow.port, secure.port)
        serverless_rows(measured, sys.executable, options.official, CannedServerless.begin(server_context(home)))
        requests = count_requests(measured, sys.executable, options.official)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"rows": measured.results, "requests": requests}, file, indent=1)
    return 0


# ==================================================================================================
# 6. SUB-COMMANDS
# ==================================================================================================

# ------------------------------------------------------------------------------------------ sandbox


def sandbox(arguments):
    """Serve a sandbox until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="test_vastai.py sandbox", description=sandbox.__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; any free one by default")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 1 << 16:
        parser.error(f"--port {options.port}: a port is a number from 1 to 65535")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        box = Sandbox(options.port, boot=5.0)
    except OSError as error:
        print(f"sandbox: cannot use port {options.port}: {error.strerror or error}\n"
              "  Choose another --port, or leave it out to get a free one.", file=sys.stderr)
        return 1
    with box, temporary_folder() as home:
        print(f"export VAST_URL={box.url}\nexport VAST_API_KEY={box.key}", flush=True)
        program = "python3 vastai.py"
        if CAN_STAND_IN:  # `ssh` to an instance is a shell on this computer
            programs, program = os.path.join(home, "bin"), "vastai"
            stand_in(programs)
            write_program(os.path.join(programs, program), f'#!/bin/sh\nexec {shlex.join([sys.executable, compiled()])} "$@"\n')
            print(f"export PATH={shlex.quote(programs)}:$PATH", flush=True)
        print(f"Paste these lines into another shell, then try: {program} search offers. Press Ctrl-C here to stop the "
              "sandbox.", file=sys.stderr, flush=True)
        try:
            while True:
                time.sleep(HOUR)
        except KeyboardInterrupt:
            return 0


# --------------------------------------------------------------------------------------------- demo


class Surprise(Exception):
    """A step of the demo did not end as expected."""


class Tour:
    """Types commands as a person would, shows them with their output, and checks both.

    The commands run on a terminal of their own, as wide as ours and colored if ours is, so that they print what a
    person sees; without pseudo-terminals (on Windows) they run in a pipe.
    """

    def __init__(self, box, home):
        self.box = box
        self.width, self.colored = shutil.get_terminal_size().columns, sys.stdout.isatty()
        self.colored = self.colored and not os.environ.get("NO_COLOR")
        self.here, programs = os.path.join(home, "here"), os.path.join(home, "bin")
        os.mkdir(self.here)
        stand_in(programs)
        self.environment = clean_environment(home, VAST_URL=box.url, VAST_API_KEY=box.key, COLUMNS=str(self.width),
                                             PATH=programs + os.pathsep + os.environ.get("PATH", os.defpath),
                                             PYTHONPATH=HERE)
        if not self.colored:
            self.environment.update(NO_COLOR="1", TERM="dumb")

    def show(self, text, color=""):
        print(f"\033[{color}m{text}\033[0m" if color and self.colored else text, flush=True)

    def say(self, text):
        """A remark, in lines as wide as the terminal."""
        self.show("\n" + textwrap.fill(text, self.width, initial_indent="# ", subsequent_indent="# "), "36")

    def vastai(self, line, status=0, expect=""):
        """Runs `vastai LINE`; the exit status must be `status`, and the regex `expect` must be in the output."""
        self.show("$ vastai " + line, "1")
        return self.run([compiled(), *shlex.split(line)], line, status, expect)

    def python(self, code, expect=""):
        """Runs a program that uses the SDK."""
        self.show("".join(f">>> {line}\n" for line in code.splitlines()).rstrip(), "1")
        return self.run(["-c", code], "the program", 0, expect)

    def run(self, words, name, status, expect):
        code, output = self.on_terminal(words) if os.name == "posix" else self.in_pipe(words)
        if code or status:
            self.show(f"(exit status {code})")
        found = re.search(expect, re.sub(r"\033\[[\d;]*m", "", output), re.MULTILINE)
        if code != status or not found:
            raise Surprise(f"{name}: expected exit status {status} and output that matches {expect!r}")
        return found

    def in_pipe(self, words):
        done = subprocess.run([sys.executable, *words], cwd=self.here, env=self.environment, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=60)
        output = done.stdout.decode("utf-8", "replace")
        self.show(output.rstrip("\n"))
        return done.returncode, output

    def on_terminal(self, words):
        """(exit status, output), which is shown as it comes."""
        import fcntl
        import pty
        import termios
        outer, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("4H", 24, self.width, 0, 0))
        process = subprocess.Popen([sys.executable, *words], cwd=self.here, env=self.environment,
                                   stdin=subprocess.DEVNULL, stdout=inner, stderr=inner)
        os.close(inner)
        decoder, output = codecs.getincrementaldecoder("utf-8")("replace"), ""
        with contextlib.suppress(OSError):  # how Linux says that the other side has closed
            for data in iter(lambda: os.read(outer, 65536), b""):
                text = decoder.decode(data).replace("\r\n", "\n")
                output += text
                sys.stdout.write(text)
                sys.stdout.flush()
        os.close(outer)
        return process.wait(60), output


def demo(arguments):
    """A guided tour: rent a GPU, use it, destroy it; a bad machine; a whole job in one command; a serverless job."""
    parser = argparse.ArgumentParser(prog="test_vastai.py demo", description=demo.__doc__)
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help=f"one of {', '.join(CHAPTERS)}; all by default")
    parser.add_argument("--boot", type=float, default=2.0, metavar="SECONDS",
                        help="how long an instance takes to start (2)")
    options = parser.parse_args(arguments)
    unknown = set(options.chapters) - set(CHAPTERS)
    if unknown:
        parser.error(f"no chapter {', '.join(sorted(unknown))}; there are {', '.join(CHAPTERS)}")
    with temporary_folder() as home, Sandbox(boot=options.boot) as box:
        tour = Tour(box, home)
        tour.say("Nothing here is real: a simulated Vast.ai runs on this computer, and needs neither account nor money. "
                 "`vastai` stands for `python3 vastai.py`.")
        try:
            for chapter in options.chapters or CHAPTERS:
                CHAPTERS[chapter](tour)
        except Surprise as surprise:
            print(f"\nNot as expected: {surprise}", file=sys.stderr)
            return 1
        tour.say("You saw: " + "; ".join(CHAPTERS[chapter].__doc__ for chapter in options.chapters or CHAPTERS) + ".")
        tour.show("""\
# Next steps:
#   python3 vastai.py --help            all commands
#   python3 vastai.py help ssh          one of them, with examples
#   python3 test_vastai.py sandbox      try them yourself, still without money
#   README.md                           recipes, the SDK, and much more""", "36")
    return 0


def first_session(tour):
    """search, rent, wait, check, log in, script, destroy"""
    tour.say("Which single RTX 4090 is the cheapest?")
    cheapest = tour.vastai("search offers 'gpu_name=RTX_4090 num_gpus=1' -o dph_total --limit 3", expect=r"^\s*(\d+)  ")
    tour.say("Rent it, and wait until it runs.")
    created = tour.vastai(f"create instance {cheapest.group(1)} --image vastai/pytorch --disk 32 --ssh --direct "
                          "--label first", expect=r"\b[Ii]nstance (\d+)")
    instance_id = created.group(1)
    tour.vastai("wait instance " + instance_id, expect="running")
    tour.say("What is running, and what does it cost?")
    tour.vastai("show instances", expect=instance_id)
    tour.say("What is it doing, and how do I get in?")
    tour.vastai(f"logs {instance_id} --tail 3", expect="loss=")
    tour.vastai("ssh-url " + instance_id, expect=r"^ssh://root@[\w.]+:\d+$")
    tour.say("Every command is also a method of the SDK, with the same names.")
    tour.python("from vastai import VastAI\n"
                f"row = VastAI().show_instance({instance_id})\n"
                "print(row['gpu_name'], row['actual_status'], row['label'])", expect="RTX 4090 running first")
    tour.say("Programs in other languages read JSON.")
    tour.vastai(f"show instance {instance_id} --raw --fields id,label", expect='"label": "first"')
    tour.say("Stop it: the GPU is free again, but the disk is still billed. Destroy it: nothing is billed anymore.")
    tour.vastai("stop instance " + instance_id)
    tour.vastai(f"destroy instance {instance_id} -y")
    tour.say("An error says what is wrong and what to do; its exit status says which kind.")
    tour.vastai("show instance 99999", status=4, expect="99999")
    tour.vastai("search offers 'gpu_nmae=RTX_4090'", status=1, expect="gpu_name")


def bad_machine(tour):
    """an instance that does not start is destroyed, and the next machine rented"""
    offers = [row for row in tour.box.market.rows("offers") if row["rentable"] and row["verification"] == "verified"
              and (row["gpu_name"], row["num_gpus"]) == ("RTX 4090", 1)]
    cheapest = min(offers, key=lambda row: row["dph_base"])
    tour.box.machine(cheapest["machine_id"], starts=False, message="Error response from daemon: no space left on device")
    tour.say("Some machines fail: the disk of the cheapest one is full now. `launch` destroys an instance that does not "
             "start and rents the next best offer within your price.")
    launched = tour.vastai("launch instance --query 'gpu_name=RTX_4090 num_gpus=1' --image vastai/pytorch "
                           "--max-price 0.60", expect=r"(?s)no space left on device.*[Ii]nstance (\d+) is running")
    tour.vastai(f"destroy instance {launched.group(1)} -y")


TRAIN = """\
import os, sys
os.mkdir("out")
with open("out/loss.csv", "w") as file:
    for epoch in range(1, 4):
        print(f"epoch {epoch}: loss {1 / epoch:.2f}", flush=True)
        print(epoch, f"{1 / epoch:.2f}", sep=",", file=file)
sys.exit(3)  # not good enough
"""


def whole_job(tour):
    """a whole job in one command: rent, upload, run, download, destroy"""
    if not CAN_STAND_IN:
        tour.say("`run` is left out here: what stands in for the rented machine needs /bin/sh and setsid.")
        return
    held = set(tour.box.market.tables["instances"])
    pathlib.Path(tour.here, "train.py").write_text(TRAIN)
    tour.say("A whole job in one command: `run` rents a machine, uploads, runs, downloads, and destroys the machine, "
             "whatever happens. Its exit status is the job's. (Here a stand-in for ssh runs the job on this computer.)")
    tour.vastai("run pytorch/pytorch --gpu RTX_3090 --max-hours 1 --upload train.py --download out -- python3 train.py",
                status=3, expect=r"(?s)epoch 3: loss 0\.33.*status 3 .*destroyed\s+after .*\$\d")
    tour.show("$ cat out/loss.csv", "1")
    tour.show(pathlib.Path(tour.here, "out", "loss.csv").read_text().rstrip())
    if set(tour.box.market.tables["instances"]) != held:
        raise Surprise("an instance is left behind")


def serverless_job(tour):
    """a job for a serverless endpoint"""
    tour.say("Send a job to a serverless endpoint: a router chooses the worker, and the answer streams back.")
    tour.vastai("request my-endpoint /v1/completions --stream --text --json "
                """'{"prompt": "the capital of France is Paris", "stream": true}'""", expect="You said: .* Paris")


CHAPTERS = {"first": first_session, "bad-machine": bad_machine, "run": whole_job, "serverless": serverless_job}


# -------------------------------------------------------------------------- all tests, on all cores

LONGEST = ("ReadmeTest", "EveryCommandTest", "TestRun", "SubCommandTest", "ScreenTest", "TestHostileText", "PureTest",
           "TestProcesses", "TestBadInput")  # they begin first, so that none of them is alone at the end
MOST_WORKERS = 4
TOO_LONG = 300  # seconds for one class: what hangs, or grows with the square of its input, ends
COUNTS = {"failures": "failures", "errors": "errors", "skipped": "skipped",
          "expected failures": "expectedFailures", "unexpected successes": "unexpectedSuccesses"}


def restore_signals():
    """Undoes what nohup and shells do to jobs in the background: tests send real signals."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def worker(arguments):
    """Run the test classes whose names come on stdin; a line of JSON on stdout tells of each."""
    argparse.ArgumentParser(prog="test_vastai.py worker", description=worker.__doc__).parse_args(arguments)
    restore_signals()
    names, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what a test prints is no answer
    for name in map(str.strip, names):
        faulthandler.dump_traceback_later(TOO_LONG, exit=True)
        shown = io.StringIO()
        runner = unittest.TextTestRunner(shown, warnings=None if sys.warnoptions else "default")
        result = runner.run(unittest.defaultTestLoader.loadTestsFromName(name, sys.modules["__main__"]))
        signs, _, rest = shown.getvalue().partition("\n")
        counts = {word: len(getattr(result, member)) for word, member in COUNTS.items()}
        answer = {"run": result.testsRun, "signs": signs, "counts": counts, "good": result.wasSuccessful(),
                  "trouble": rest.rpartition(result.separator2 + "\nRan ")[0]}
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def in_trouble(name, text):
    """What a worker would have answered for a class that could not be run as it should."""
    rule = unittest.TextTestResult.separator1 + "\n", unittest.TextTestResult.separator2 + "\n"
    return {"run": 0, "signs": "E", "counts": {"errors": 1}, "good": False,
            "trouble": f"{rule[0]}ERROR: {name}\n{rule[1]}{text}\n\n"}


class Worker:
    """A process that runs test classes, in a home and a folder for temporary files of its own."""

    def __init__(self, home):
        words = [sys.executable, *(f"-W{option}" for option in sys.warnoptions), sys.argv[0], "worker"]
        environment = {**os.environ, "HOME": home, "USERPROFILE": home, "TMPDIR": home, "TEMP": home, "TMP": home}
        self.process = subprocess.Popen(words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        encoding="utf-8", start_new_session=True)
        self.dead = False

    def run(self, name):
        """What is to be told of a class."""
        watch = threading.Timer(TOO_LONG + 10, self.kill)
        watch.start()
        try:
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        watch.cancel()
        if not line:
            self.dead = True
            self.kill()
            return in_trouble(name, f"The process that ran these tests ended with status {self.process.wait()}.")
        answer = json.loads(line)
        return answer if answer["run"] + answer["counts"]["skipped"] else in_trouble(name, "No test ran.")

    def end(self):
        """Its exit status, once it has nothing more to do."""
        self.process.stdin.close()
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.wait()

    def kill(self):
        """Ends it with all that it has started."""
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()


class Crew:
    """Workers that take the test classes of a program from one queue, and what they told."""

    def __init__(self, names):
        self.names, self.answers, self.workers = names, [], []
        order = {name: number for number, name in enumerate(LONGEST)}
        self.queue = collections.deque(sorted(names, key=lambda name: order.get(name, len(order))))

    def run(self, number):
        """Runs all classes in so many processes; Ctrl-C and SIGTERM end them at once."""
        threads = [threading.Thread(target=self.work, daemon=True) for _ in range(number)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self.queue.clear()
            for worker in self.workers:
                worker.kill()
            for thread in threads:
                thread.join()

    def work(self):
        """What one thread does: it has a worker, and replaces it if it has died."""
        with temporary_folder() as home:
            worker = None
            with contextlib.suppress(IndexError):
                while True:
                    name = self.queue.popleft()
                    if worker is None or worker.dead:
                        worker = Worker(home)
                        self.workers.append(worker)
                    self.told(name, worker.run(name))
            if worker and not worker.dead and worker.end():
                self.told(name, in_trouble(name, f"After these tests a process ended with status {worker.end()}."))

    def told(self, name, answer):
        self.answers.append((name, answer))
        print(answer["signs"], end="", file=sys.stderr, flush=True)

    def tell(self, seconds):
        """Tells of all classes as unittest does; True if all is well."""
        missing = set(self.names) - {name for name, _ in self.answers}
        self.answers += [(name, in_trouble(name, "It was never run.")) for name in missing]
        told = [answer for _, answer in sorted(self.answers, key=lambda pair: self.names.index(pair[0]))]
        counts = {word: sum(answer["counts"].get(word, 0) for answer in told) for word in COUNTS}
        remarks = ", ".join(f"{word}={count}" for word, count in counts.items() if count)
        good = bool(told) and all(answer["good"] for answer in told)
        print("\n" + "".join(answer["trouble"] for answer in told) + unittest.TextTestResult.separator2, file=sys.stderr)
        print(f"Ran {sum(answer['run'] for answer in told)} tests in {seconds:.3f}s\n", file=sys.stderr)
        print(("OK" if good else "FAILED") + (f" ({remarks})" if remarks else ""), file=sys.stderr)
        return good


def run_everything():
    """Runs every test class of the program, on all cores; returns the exit status."""
    began = time.monotonic()
    crew = Crew([name for name, value in vars(sys.modules["__main__"]).items() if isinstance(value, type)
                 and issubclass(value, unittest.TestCase) and unittest.defaultTestLoader.getTestCaseNames(value)])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        crew.run(min(cores + 1, MOST_WORKERS))  # one more than cores, as tests wait a third of their time
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    return 0 if crew.tell(time.monotonic() - began) else 1


# --------------------------------------------------------------------------------------------- main

SUBCOMMANDS = {"demo": demo, "sandbox": sandbox, "write": write, "bench": bench, "worker": worker}
SUBCOMMANDS.update((name, functools.partial(write, names=[name])) for name in BLOCKS)  # one block alone


def main(argv):
    """A sub-command, or else the tests."""
    if argv[1:2] in (["-h"], ["--help"], ["help"]):
        print(__doc__.strip())
        return 0
    if len(argv) > 1 and argv[1] in SUBCOMMANDS:
        return SUBCOMMANDS[argv[1]](argv[2:])
    if not argv[1:]:
        return run_everything()
    restore_signals()
    faulthandler.dump_traceback_later(2 * TOO_LONG, exit=True)
    return unittest.main(argv=argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
