#!/usr/bin/env python3
"""Tests for `vastai.py`, and the simulated Vast.ai that they talk to.

    python3 test_vastai.py                  run the tests (takes the arguments of unittest)
    python3 test_vastai.py demo             a guided walk-through, against a sandbox of its own
    python3 test_vastai.py sandbox          serve a sandbox until Ctrl-C: try everything without an account

The sandbox is a small Vast.ai on a loopback port. It keeps state: what is rented appears in the list, boots, costs
money and can be destroyed. From a test it is used like this:

    with Sandbox(boot=0.2) as box:
        client = vastai.VastAI(api_key=box.key, server_url=box.url)
        box.fail("PUT /api/v0/asks/.*", status=503)         # the next request that matches gets this answer instead
        ...
        box.requests[-1]["body"]                            # everything that arrived, in order

Standard library only, CPython 3.8 and newer.
"""

from __future__ import annotations

import argparse
import base64
import collections
import gzip
import hashlib
import http.server
import itertools
import json
import operator
import os
import random
import re
import shlex
import signal
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import urllib.parse

HERE = os.path.dirname(os.path.abspath(__file__))
HOUR, DAY = 3600, 86400
HOURS_PER_MONTH = 730

# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: answers and refusals
# ----------------------------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: the query language of the service - conditions, order, pages
# ----------------------------------------------------------------------------------------------------------------------

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


def select(rows, conditions):
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


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: the goods - GPU models, offers, templates
# ----------------------------------------------------------------------------------------------------------------------

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
    secure = verification == "verified" and (model.watts > 350 and model.price > 0.9 or rng.random() < 0.25)
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


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: an instance
# ----------------------------------------------------------------------------------------------------------------------

COPIED_FROM_OFFER = (
    "bundle_id bw_nvlink cluster_id compute_cap cpu_arch cpu_cores cpu_cores_effective cpu_name cpu_ram cuda_max_good "
    "direct_port_count disk_bw disk_name dlperf driver_version end_date external geolocation gpu_arch gpu_frac "
    "gpu_lanes gpu_mem_bw gpu_name gpu_ram host_id hosting_type inet_down inet_down_cost inet_up inet_up_cost "
    "machine_id min_bid mobo_name num_gpus os_version pci_gen pcie_bw reliability2 rentable static_ip storage_cost "
    "total_flops verification vericode webpage").split()
FILES = {"/root/onstart.sh": 214, "/workspace/train.py": 5187, "/workspace/data/tokens.bin": 412090368,
         "/workspace/checkpoints/epoch-1.pt": 268512744, "/workspace/checkpoints/epoch-2.pt": 268512744}


class Instance:
    """A rented instance: the facts of the contract, and the few times from which everything else follows."""

    def __init__(self, contract_id, offer, terms, template, now):
        self.id, self.offer, self.keys, self.files = contract_id, offer, {}, dict(FILES)
        self.started = self.billed = now
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
            env = dict(re.findall(r"-e\s+(\w+)=(\S+)", env))
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

    def status(self, now, boot):
        if self.goal == "stopped":
            return "exited"
        age = now - self.started
        return "created" if age < boot / 4 else "loading" if age < boot else "running"

    def ports(self):
        """Published ports: those asked for with -p, and ssh and Jupyter where they are direct."""
        runtype, first = self.row["image_runtype"], 40000 + self.id % 2000 * 10
        inner = ["22/tcp"] * ("_direc" in runtype) + ["8080/tcp"] * ("jupyter_direc" in runtype)
        for name, _ in self.row["extra_env"]:
            asked = re.match(r"-p \d+:(\d+)(/\w+)?$", name)
            inner += [asked.group(1) + (asked.group(2) or "/tcp")] if asked else []
        return {port: [{"HostIp": host, "HostPort": str(first + nth)} for host in ("0.0.0.0", "::")]
                for nth, port in enumerate(inner)}

    def view(self, now, boot):
        """The row as the service answers it at this moment."""
        status = self.status(now, boot)
        running, image = status == "running", self.row["image_uuid"]
        message = {"created": None, "loading": f"Pulling from {image.partition(':')[0]}",
                   "running": f"success, running {image}/{self.row['image_runtype'].split('_')[0]}",
                   "exited": "success, stopped by user"}[status]
        uptime = max(0.0, now - self.started - boot) / 60 if running else None
        return dict(
            self.row, actual_status=status, cur_state=self.goal, next_state=self.goal, intended_status=self.goal,
            status_msg=message, uptime_mins=uptime, ports=self.ports() if running else None,
            public_ipaddr=self.offer["public_ipaddr"] if status != "created" else None,
            duration=max(0.0, self.row["end_date"] - now), time_remaining="", host_run_time=2592000.0,
            cpu_util=0.11 if running else 0.0, gpu_util=72.0 if running else None, gpu_temp=61.0 if running else None,
            mem_limit=self.row["cpu_ram"] / 1024, mem_usage=3.25 if running else None,
            vmem_usage=0.54 if running else None, disk_usage=round(sum(self.files.values()) / 1e9, 2),
            disk_util=round(sum(self.files.values()) / 1e9 / self.row["disk_space"], 3))

    def container_log(self, now):
        """What the container wrote since it was started: one line a second once it trains, at most a thousand."""
        since, row = self.started, self.row
        lines = [(0, f"container {self.id} starting, image {row['image_uuid']}"),
                 (0, f"found {row['num_gpus']} x {row['gpu_name']}, driver {row['driver_version']}")]
        for step in range(1, min(1000, 3 + int(now - since))):
            lines.append((step, f"step {step:5d} loss={0.4 + 8.0 / (step + 2):.4f} lr=3.0e-04"))
            if step % 50 == 0:
                lines.append((step, "WARN: dataloader is slower than the GPU"))
        return [f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(since + second))} {text}" for second, text in lines]

    def daemon_log(self):
        return [f"[kaalia] instance C.{self.id} requested", "[kaalia] docker pull " + self.row["image_uuid"],
                f"[kaalia] docker run --gpus {self.row['num_gpus']} OK"]

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


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: the market - all state, and what it starts with
# ----------------------------------------------------------------------------------------------------------------------


class Market:
    """Everything the simulated service knows. The routes below read and change it, one request at a time."""

    def __init__(self, key, credit, boot, clock):
        self.key, self.boot, self.now, self.url = key, boot, clock, ""
        self.born, self.ids = clock(), itertools.count(30000001)
        self.results, self.secrets, self.team, self.preferences = {}, {"HF_TOKEN": "hf_example"}, None, {}
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
            instance = new_instance(self, offer, {
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
        group = {"endpoint_name": "vLLM-Qwen3-8B", "template_id": 88203, "search_params": "gpu_name=RTX_4090"}
        call = Call("POST", "/", {}, json.dumps(group).encode())
        endpoint = create_endpoint(self, call)["result"]
        create_workergroup(self, call)
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
        row.setdefault("id", next(self.ids))
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
        """Brings the credit up to date; called before every request."""
        now = self.now()
        self.user["credit"] -= sum(instance.bill(now) for instance in self.rows("instances"))

    def store(self, text):
        """Puts a result where presigned URLs lead; like the real storage it takes a moment to appear there."""
        name = f"{digest('result', len(self.results))}.log"
        self.results[name] = (self.now() + min(0.4, self.boot / 2), text)
        return f"{self.url}/storage/{name}?X-Amz-Expires=300&X-Amz-Signature={digest(name)[:16]}%2B%3D"


def new_payment(nth, user, now):
    """One line of the payment history, the newest first; every sixth is a transfer."""
    service, cents = ("transfer", -500) if nth % 6 == 5 else (("stripe_payments", "coinbase")[nth % 3 == 2], 2500)
    when = now - nth * 2.5 * DAY - HOUR
    row = dict.fromkeys("payment_expected original_amount cut_amount cut_percent stripe_charge stripe_refund "
                        "stripe_payout error paypal_email transfer_group".split())
    return dict(row, id=2185400 - nth, user_id=user["id"], when=when, paid_on=when + 60, amount_cents=cents,
                is_credit=cents > 0, is_delayed=False, balance_before=0.0, balance_after=cents / 100, service=service,
                event_id=f"evt_{digest(nth)[:8]}", extra={}, failed=False, refunded=False, is_check=False)


def new_charge(instance, days_ago, now):
    """What one instance cost on one day."""
    row, start = instance.row, now - (days_ago + 1) * DAY
    hours = 24.0 if instance.goal == "running" else 0.0
    common = {"start": start, "end": start + DAY}
    items = [dict(common, type=kind, source=None, description=text, amount=round(amount, 3), metadata={}, items=[])
             for kind, amount, text in (
                 ("gpu", hours * row["dph_base"], f"{hours:.3f} hours at ${row['dph_base']:.3f}/hour"),
                 ("disk", 24 * instance.disk_per_hour, f"{row['disk_space']:.0f} GB at ${row['storage_cost']}/month"))]
    return dict(common, type="instance", source=f"instance-{instance.id}", metadata={"label": row["label"]},
                items=items, description=f"instance {instance.id} charges",
                amount=round(sum(item["amount"] for item in items), 3))


def cluster_nodes(subnet, machine_ids, taken=0):
    """Nodes with addresses in the subnet; the first of a new cluster is its manager."""
    prefix = subnet.rpartition(".")[0]
    return [{"machine_id": machine_id, "is_cluster_manager": taken + nth == 0,
             "local_ip": f"{prefix}.{taken + nth + 2}"} for nth, machine_id in enumerate(machine_ids)]


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: routes for searching and renting
# ----------------------------------------------------------------------------------------------------------------------
# A route is a function (market, call, *ids from the path) that returns the answer or raises Refusal.


def offers_for(market, body):
    """The priced offers that meet a search, in its order."""
    kind, storage = body.get("type", "on-demand"), number(body.get("allocated_storage", 5.0))
    if kind not in ("on-demand", "ondemand", "bid", "reserved"):
        raise Refusal(400, "invalid_args", f"Invalid offer type {kind!r}")
    rows = [priced(offer, kind, storage or 0.0) for offer in market.rows("offers")]
    return found(rows, body)


def found(rows, body):
    """Conditions, order and limit of a search applied to its rows."""
    rows = select(rows, {field: tests for field, tests in body.items() if field not in NOT_CONDITIONS})
    limit = number(body.get("limit") or 64)
    if limit is None or limit < 1:
        raise Refusal(400, "invalid_args", f"Invalid limit {body['limit']!r}")
    return arranged(rows, body.get("order"))[:int(limit)]


def search_asks(market, call):
    return {"offers": columns(offers_for(market, call.body.get("q") or {}), call.body.get("select_cols"))}


def searching(table):
    return lambda market, call: {"offers": found(market.rows(table), call.body)}


def search_templates(market, call):
    rows = arranged(select(market.rows("templates"), call.query.get("select_filters")), call.query.get("order_by"))
    return {"success": True, "templates_found": len(rows), "templates": columns(rows, call.query.get("select_cols"))}


def search_benchmarks(market, call):
    rows = arranged(select(market.rows("benchmarks"), call.query.get("select_filters")), call.query.get("order_by"))
    page, following = page_of(rows, call.query, 25, 100)
    return {"success": True, "benchmarks_found": len(rows), "next_token": following,
            "benchmarks": columns(page, call.query.get("select_cols"))}


def rent(market, offer_id, terms):
    """Makes an instance from an offer, or says why not."""
    by_hash = terms.get("template_hash_id")
    template = market.find_template(by_hash) if by_hash else None
    if not (terms.get("image") or template):
        raise Refusal(400, "invalid_args", "image or template_hash_id is required")
    offer = market.tables["offers"].get(offer_id)
    if not offer or offer["rented"] or not offer["rentable"]:
        raise Refusal(404, "no_such_ask", "error 404/3603: no_such_ask "
                      f"Instance type by id {offer_id} is not available.", ask_id=offer_id)
    bid, disk = terms.get("price"), number(terms.get("disk") or 10)
    if disk is None:
        raise Refusal(400, "invalid_args", f"Invalid disk size {terms['disk']!r}")
    if bid is not None and (number(bid) or 0) < offer["min_bid"]:
        raise Refusal(400, "bid_too_low", f"Your bid of {bid} is below the minimum of {offer['min_bid']}.")
    if disk > offer["disk_space"]:
        raise Refusal(400, "invalid_args", f"Only {offer['disk_space']} GB of disk are left on this machine.")
    if priced(offer, storage=disk)["dph_total"] > market.user["balance"] + market.user["credit"]:
        raise Refusal(400, "insufficient_credit", "Your account lacks credit; see the billing page.")
    return new_instance(market, offer, terms, template)


def new_instance(market, offer, terms, template=None):
    """The contract itself; it takes the offer off the market."""
    instance = Instance(next(market.ids), offer, terms, template, market.now())
    if terms.get("volume_info"):
        attach_volume(market, instance, terms["volume_info"])
    offer.update(rented=True, rentable=False)
    market.tables["instances"][instance.id] = instance
    return instance


def attach_volume(market, instance, wish):
    if wish.get("create_new"):
        volume = new_volume(market, "volume_offers", wish["volume_id"], wish.get("size") or 15, wish.get("name"))
    else:
        volume = market.find("volumes", wish["volume_id"])
    volume["instances"].append(instance.id)
    instance.row["volume_info"] = [{"id": volume["id"], "mount_path": wish.get("mount_path"),
                                    "avail_space": volume["disk_space"], "total_space": volume["disk_space"]}]


def create_instance(market, call, offer_id):
    return {"success": True, "new_contract": rent(market, offer_id, call.body).id}


def create_instances(market, call):
    ids = call.need("ids")
    if len(ids) > 64:
        raise Refusal(400, "invalid_args", "too many asks")
    return {"success": True, "new_contracts": [rent(market, offer_id, call.body).id for offer_id in ids]}


def launch_instance(market, call):
    offers = offers_for(market, call.need("q"))
    if not offers:
        raise Refusal(404, "no_offers", "No offers matched your request")
    return {"success": True, "new_contract": rent(market, offers[0]["id"], call.body).id}


def create_template(market, call):
    if not call.body.get("name"):
        raise Refusal(400, "invalid_args", "Template name is required")
    call.need("image")
    row = market.add("templates", new_template(call.body, next(market.ids), market.user["id"], market.now()))
    return {"success": True, "msg": f"Template Created Successfully! New Template ID: {row['id']}",
            "template": row}


def update_template(market, call):
    old = market.find_template(call.need("hash_id"))
    row = market.add("templates", new_template(dict(old, **call.body), old["id"], old["creator_id"], market.now()))
    return {"success": True, "template": row}


def delete_template(market, call):
    row = market.find_template(call.body.get("hash_id"), call.body.get("template_id"))
    market.remove("templates", row["id"])
    return {"success": True, "msg": "Template Deleted Successfully!"}


def metrics_now(market, call):
    """Market figures by GPU model, from the offers that the query lets through."""
    wanted = {"verified": {"yes": True, "no": False}.get(call.query.get("verified")),
              "datacenter": {"secure_cloud": True, "community": False}.get(call.query.get("hosting_type"))}
    conditions = {field: {"eq": value} for field, value in wanted.items() if value is not None}
    if isinstance(call.query.get("num_gpus"), int):
        conditions["num_gpus"] = {"eq": call.query["num_gpus"]}
    offers = select(market.rows("offers"), conditions)
    return {"success": True, "gpus": [metrics_of(model, [row for row in offers if row["gpu_name"] == model.name])
                                      for model in MODELS]}


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


def metrics_history(market, call):
    now = int(market.now())
    end, step = int(call.query.get("end") or now), int(call.query.get("step") or HOUR)
    start = int(call.query.get("start") or end - 2 * DAY)
    times = list(range(start, end + 1, max(step, (end - start) // 2000, 60)))
    names = [name.strip() for name in str(call.query.get("gpu_name", "RTX 4090")).split(",")]
    return {"success": True, "gpus": {model.name: history_of(model, times) for model in MODELS if model.name in names}}


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


def metrics_locations(market, call):
    places = {place: rest for place, *rest in SITES}
    rows = []
    for offer in market.rows("offers"):
        city, latitude, longitude = places[offer["geolocation"]]
        rows.append({"latitude": latitude, "longitude": longitude, "city": city, "rented": offer["rented"],
                     "country_code": country_code(offer["geolocation"]), "gpu_name": offer["gpu_name"],
                     "state": "rented" if offer["rented"] else "available", "num_gpus": offer["num_gpus"],
                     "verified": offer["verification"] == "verified", "datacenter": offer["hosting_type"] == 1})
    return {"success": True, "locations": rows}


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: routes for instances
# ----------------------------------------------------------------------------------------------------------------------


def views(market):
    return [instance.view(market.now(), market.boot) for instance in market.rows("instances")]


def show_instance(market, call, instance_id):
    instance = market.tables["instances"].get(instance_id)
    return {"instances": instance and instance.view(market.now(), market.boot)}


def show_instances(market, call):
    rows = arranged(select(views(market), call.query.get("select_filters")), call.query.get("order_by"))
    page, following = page_of(rows, call.query, 25, 25)
    labels = collections.Counter(row["label"] or "" for row in rows)
    return {"success": True, "instances_found": len(page), "total_instances": len(rows), "label_counts": labels,
            "next_token": following, "instances": columns(page, call.query.get("select_cols"))}


def instance_filters(market, call):
    names = ("actual_status", "verification", "gpu_name")
    seen = {tuple(row[name] for name in names) for row in views(market)}
    return {"success": True, "filters": [dict(zip(names, values)) for values in sorted(seen)]}


def destroy_instances(market, call, *ids):
    """One or, with `instance_ids` in the body, many; each gives its offer back to the market."""
    for instance in [market.find("instances", instance_id) for instance_id in ids or call.need("instance_ids")]:
        instance.offer.update(rented=False, rentable=True)
        for volume in market.rows("volumes"):
            volume["instances"] = [holder for holder in volume["instances"] if holder != instance.id]
        market.remove("instances", instance.id)
    return {"success": True}


def change_instance(market, call, *ids):
    """State or label of one instance or, with ids in the body, of many."""
    ids = ids or call.body.get("IDs") or call.need("ids")
    instances = [market.find("instances", instance_id) for instance_id in ids]
    state, label = "running" if call.path.endswith("/start/") else call.body.get("state"), call.body.get("label")
    if state not in ("running", "stopped", None) or (state is None and label is None):
        raise Refusal(400, "invalid_args", "state must be running or stopped, or label must be given")
    for instance in instances:
        if state:
            instance.set_goal(state, market.now())
        if label is not None:
            instance.row["label"] = label
    return {"success": True}


def restart(market, call, instance_id):
    instance = market.find("instances", instance_id)
    if instance.goal != "running":
        raise Refusal(400, "invalid_args", f"Instance {instance_id} is not running.")
    instance.started = market.now()
    if "recycle" in call.path:
        instance.files = dict(FILES)
    return {"success": True}


def change_bid(market, call, instance_id):
    instance, bid = market.find("instances", instance_id), call.body.get("price")
    if bid is not None and not (number(bid) or 0) >= 0.001:
        raise Refusal(400, "invalid_args", "Please set a bid price >= 0.001.")
    instance.row["is_bid"] = True
    instance.price(bid if bid is not None else instance.offer["min_bid"] * 1.05)
    return {"success": True}


def prepay(market, call, instance_id):
    instance, amount = market.find("instances", instance_id), number(call.need("amount"))
    market.spend(amount, status=411)
    instance.row["credit_balance"] = (instance.row["credit_balance"] or 0.0) + amount
    months = instance.row["credit_balance"] / (instance.row["dph_total"] * HOURS_PER_MONTH)
    return {"success": True, "timescale": round(months, 4), "discount_rate": min(0.4, round(0.1 * months, 4))}


def show_deposit(market, call, instance_id):
    deposit = market.find("instances", instance_id).row["credit_balance"] or 0.0
    return {"success": True, "refundable_deposit": deposit, "total_discount": round(deposit * 0.1, 2),
            "discount_months": 3 if deposit else 0}


def show_price_increases(market, call):
    rows = market.rows("price_increases")
    return {"success": True, "count": len(rows), "truncated": False, "pending_price_increases": rows}


def update_instance(market, call, instance_id):
    instance, body = market.find("instances", instance_id), call.body
    named = body.get("template_hash_id") or body.get("template_id")
    template = market.find_template(body.get("template_hash_id"), body.get("template_id")) if named else None
    instance.configure(body, template)
    return {"success": True, "updated_instance": {"id": instance.id, "image_uuid": instance.row["image_uuid"]}}


def request_logs(market, call, instance_id):
    instance = market.find("instances", instance_id)
    lines = instance.daemon_log() if call.body.get("daemon_logs") == "true" else instance.container_log(market.now())
    try:
        lines = [line for line in lines if re.search(call.body.get("filter") or "", line)]
    except re.error as error:
        raise Refusal(400, "invalid_args", f"Invalid filter: {error}") from None
    tail = number(call.body.get("tail"))
    lines = lines[-int(tail):] if tail else lines
    return {"success": True, "result_url": market.store("".join(line + "\n" for line in lines)),
            "msg": "Wait a few seconds and view the result_url"}


def execute(market, call, instance_id):
    instance, command = market.find("instances", instance_id), call.need("command")
    return {"success": True, "writeable_path": instance.writeable_path,
            "result_url": market.store(instance.shell(command)),
            "msg": "Command is executing, wait a few seconds and then view the result_url"}


def fetch_result(market, call, name):
    """The presigned storage: knows no keys, and is offended by them, as S3 is."""
    if call.authorization:
        raise Answer(400, "<Error><Code>InvalidArgument</Code>"
                          "<Message>Only one auth mechanism allowed</Message></Error>")
    ready, text = market.results.get(name, (float("inf"), ""))
    if market.now() < ready:
        raise Answer(404, "<Error><Code>NoSuchKey</Code></Error>")
    return Text(text)


def show_instance_keys(market, call, instance_id):
    keys = market.find("instances", instance_id).keys
    return {"success": True, "ssh_keys": json.dumps(list(keys.values()))}


def attach_key(market, call, instance_id):
    instance, text = market.find("instances", instance_id), call.need("ssh_key")
    known = next((row["id"] for row in market.rows("ssh_keys") if row["key"] == text), None) or next(market.ids)
    instance.keys[known] = {"id": known, "public_key": text}
    return {"success": True, "msg": "SSH key added to instance."}


def detach_key(market, call, instance_id, key_id):
    if market.find("instances", instance_id).keys.pop(key_id, None) is None:
        raise Refusal(404, "no_such_ssh_key", f"SSH key {key_id} is not attached to instance {instance_id}")
    return {"success": True, "msg": "SSH key removed from instance."}


def take_snapshot(market, call, instance_id):
    instance = market.find("instances", instance_id)
    call.need("personal_repo")
    market.add("backups", {"contract_id": instance.id, "type": "snapshot", "machine_id": instance.row["machine_id"],
                           "status": "pending", "created_at": market.now(), "info": None})
    return {"success": True, "msg": "snapshot scheduled"}


def backup_files(market, call, contract_id):
    """The files of an instance's latest backup; the id is the instance's."""
    if contract_id not in [row["contract_id"] for row in market.rows("backups")]:
        raise Refusal(404, "not_found", f"No backup of instance {contract_id}")
    address = f"https://files.example.com/c.{contract_id}"
    return {"success": True, "authorization_token": "4_00/ab+c=", "expires_in_sec": HOUR, "truncated": False,
            "files": [{"name": f"upper{name}", "size": size, "url": address + name} for name, size in FILES.items()]}


def settle_price_increase(market, call):
    increase_id = call.need("pending_price_increase_id")
    if increase_id not in market.tables["price_increases"]:
        raise Refusal(404, "no_pending_price_increase", f"There is no pending price increase {increase_id}.")
    row = market.remove("price_increases", increase_id)
    instance = market.tables["instances"].get(row["contract_id"])
    if instance and "accept" in call.path:
        instance.offer["dph_base"] = row["new_gpu_costpersec"] * HOUR
        instance.price()
    return {"success": True, "pending_price_increase_id": increase_id, "contract_id": row["contract_id"]}


def fetch_contracts(market, call):
    """Ids and labels of contracts, of all or of those asked for."""
    ids, label = call.body.get("contract_ids"), call.body.get("label")
    rows = [{"id": row.id, "label": row.row["label"]} for row in market.rows("instances") if not ids or row.id in ids]
    return {"success": True, "contracts": [row for row in rows if label in (None, row["label"])]}


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: routes for copies, schedules, volumes and deployments
# ----------------------------------------------------------------------------------------------------------------------


def copy(market, call):
    """Between two remotes it just begins; from or to this computer the answer says where rsync shall connect."""
    call.need("src_path", "dst_path")
    sides, answer = {side: call.body.get(f"{side}_id") for side in ("src", "dst")}, {"success": True}
    for side, place in sides.items():
        contract = re.fullmatch(r"(?:C\.)?(\d+)", str(place))
        instance = contract and market.tables["instances"].get(int(contract.group(1)))
        if contract and not instance:
            raise Refusal(400, "invalid_args", f"Invalid {side}_id.")
        if instance:
            answer.update({f"{side}_addr": instance.offer["public_ipaddr"], f"{side}_port": 22000 + instance.id % 1000})
    if set(sides.values()) & {None, "local"}:
        return answer
    return {"success": True, "msg": "Remote to Remote copy initiated - check instance status bar for progress updates."}


def cloud_copy(market, call):
    selected = call.need("selected")
    if number(selected) not in market.tables["connections"]:
        raise Refusal(400, "invalid_args", f"Unknown cloud connection {selected}")
    market.find("instances", int(number(call.need("instance_id")) or 0))
    return {"success": True, "msg": "Cloud Copy Operation Started", "result_url": None}


def create_job(market, call):
    """At most one job for an instance and endpoint: a second one is answered with the id of the first."""
    instance_id, api_endpoint = call.need("instance_id", "api_endpoint")
    for job in market.rows("jobs"):
        if (job["instance_id"], job["api_endpoint"]) == (instance_id, api_endpoint):
            raise Refusal(422, "job_exists", "A scheduled job exists already", scheduled_job_id=job["id"])
    job = {"min_of_the_hour": 0, "day_of_the_week": None, "hour_of_the_day": None}
    job = market.add("jobs", dict(job, **call.body))
    return {"success": True, "scheduled_job_id": job["id"]}


def update_row(table):
    """The members of the body that the row has are set; null leaves them."""
    def route(market, call, row_id):
        row = market.find(table, row_id)
        row.update({name: value for name, value in call.body.items()
                    if name in row and name != "id" and value is not None})
        return {"success": True, "id": row_id}
    return route


def new_volume(market, table, offer_id, size, name=None):
    """A volume made from an offer, or as a copy of another volume's."""
    offer, volume_id = market.find(table, offer_id), next(market.ids)
    return market.add("volumes", {
        "id": volume_id, "cluster_id": offer.get("cluster_id"), "label": name, "disk_space": float(size),
        "status": "active", "start_date": market.now(), "public_ipaddr": "203.0.113.45", "instances": [],
        **{field: offer[field] for field in ("disk_name", "driver_version", "inet_up", "inet_down", "reliability2",
                                             "machine_id", "verification", "host_id", "geolocation")}})


def create_volume(table, prefix):
    def route(market, call):
        volume = new_volume(market, table, call.need("id"), call.body.get("size") or 15, call.body.get("name"))
        return {"success": True, "volume_name": f"{prefix}.{volume['id']}"}
    return route


def clone_volume(market, call):
    source_id, offer_id = call.need("src_id", "dst_id")
    source = market.find("volumes", source_id)
    size = call.body.get("size") or source["disk_space"]
    volume = new_volume(market, "volume_offers", offer_id, size, source["label"])
    return {"success": True, "volume_name": f"V.{volume['id']}"}


def show_volumes(market, call):
    kind = call.query.get("type", "all_volume")
    return {"volumes": [row for row in market.rows("volumes")
                        if kind in ("all_volume", "network_volume" if row["cluster_id"] else "local_volume")]}


def delete_volume(market, call):
    volume = market.tables["volumes"].get(call.query.get("id"))
    if volume is None:
        raise Refusal(404, "no_such_volume", "Volume with that ID does not exist.")
    if volume["instances"]:
        raise Refusal(400, "volume_in_use", f"Volume is attached to instance {volume['instances'][0]}")
    market.remove("volumes", volume["id"])
    return {"success": True}


def list_volume(market, call):
    """A host offers space on one machine or on several for volumes."""
    machines, listed = call.need("machine"), None
    for machine_id in machines if isinstance(machines, list) else [machines]:
        market.find("machines", machine_id)
        offer = next(row for row in market.rows("offers") if row["machine_id"] == machine_id)
        listed = market.add("volume_offers", dict(volume_offer(offer, next(market.ids)),
                                                  disk_space=call.body.get("size") or 15,
                                                  storage_cost=call.body.get("price_disk") or 0.1))
    return {"success": True, "msg": f"volume on machine {machines} offered", "id": listed["id"]}


def list_network_volume(market, call):
    market.find("network_disks", call.need("disk_id"))
    row = network_volume_offer(market.rows("offers")[0], next(market.ids), 12)
    row.update(disk_space=call.body.get("size") or 15, storage_cost=call.body.get("price_disk") or 0.15)
    market.add("network_offers", row)
    return {"success": True, "msg": f"Listed network volume offer {row['id']}", "id": row["id"]}


def unlist(table, noun):
    def route(market, call):
        market.remove(table, call.need("id"))
        return {"success": True, "msg": f"Unlisted {noun} {call.body['id']}."}
    return route


def show_network_disks(market, call):
    disks = market.rows("network_disks")
    machines = sorted({machine for disk in disks for machine in disk["machines"]})
    return {"success": True, "data": [{
        "cluster_id": 12, "machine_ids": machines,
        "mounts": {str(machine): disk["mount_point"] for disk in disks for machine in disk["machines"]},
        "network_disks": [{"network_disk_id": disk["id"], "free_space": 900.5, "total_space": 1000.0}
                          for disk in disks]}]}


def add_network_disk(market, call):
    machines, mount_point = call.need("machines", "mount_point")
    disk = {"machines": machines, "mount_point": mount_point}
    if call.body.get("disk_id"):
        disk["id"] = call.body["disk_id"]
    return {"success": True, "disk_id": market.add("network_disks", disk)["id"], "msg": "ok"}


def deployment_versions(market, call, deployment_id):
    row = market.find("deployments", deployment_id)
    versions = (("current_version_id", "updated_at", None), ("last_healthy_version_id", "created_at", True))
    return {"success": True, "versions": [{"id": row[name], "file_hash": digest(row[name])[:16], "created_at": row[at],
                                           "healthy": healthy} for name, at, healthy in versions]}


def deployment_state(state):
    def route(market, call, deployment_id):
        market.find("deployments", deployment_id)["endpoint_state"] = state
        return {"success": True, "endpoint_state": state}
    return route


def delete_deployments(market, call):
    name, tag = call.need("name"), call.body.get("tag")
    ids = [row["id"] for row in market.rows("deployments") if row["name"] == name and tag in (None, row["tag"])]
    if not ids:
        raise Refusal(404, "not_found", f"Deployment {name} not found")
    for deployment_id in ids:
        market.remove("deployments", deployment_id)
    return {"success": True, "count": len(ids)}


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: routes for hosts - machines, clusters, overlays
# ----------------------------------------------------------------------------------------------------------------------


def machine_offers(market, machine_id):
    market.find("machines", machine_id)
    return [row for row in market.rows("offers") if row["machine_id"] == machine_id]


def list_machine(market, call):
    """Puts a machine on the market; what is not given stays as it was."""
    machine, chunk = call.need("machine", "min_chunk")
    if machine not in market.tables["machines"]:
        return {"success": False, "msg": "Only machine owner can create ask contracts"}
    row, price = market.find("machines", machine), call.body.get("price_gpu")
    for name, given in (("listed_gpu_cost", price), ("listed_inet_up_cost", call.body.get("price_inetu")),
                        ("listed_inet_down_cost", call.body.get("price_inetd")),
                        ("min_bid_price", call.body.get("price_min_bid")),
                        ("credit_discount_max", call.body.get("credit_discount_max"))):
        row[name] = row[name] if given is None else given
    row["listed"] = True
    for offer in machine_offers(market, machine):
        offer.update(rentable=not offer["rented"], dph_base=row["listed_gpu_cost"] * offer["num_gpus"])
    return {"success": True, "extended": 0, "msg": f"ask contracts created, min_chunk {chunk}"}


def unlist_machine(market, call, machine_id):
    for offer in machine_offers(market, machine_id):
        offer["rentable"] = False
    market.find("machines", machine_id)["listed"] = False
    return {"success": True, "machine_id": machine_id, "user_id": market.user["id"]}


def delete_machine(market, call, machine_id):
    if any(offer["rented"] for offer in machine_offers(market, machine_id)):
        return {"success": False, "msg": "machine has active client contracts"}
    unlist_machine(market, call, machine_id)
    market.remove("machines", machine_id)
    return {"success": True, "msg": f"machine {machine_id} deleted"}


def set_min_bid(market, call, machine_id):
    market.find("machines", machine_id)["min_bid_price"] = call.body.get("price")
    return {"success": True, "you_sent": call.body}


def set_default_job(market, call):
    machine_id = call.need("machine")
    market.find("machines", machine_id)
    market.tables["default_jobs"][machine_id] = call.body
    return {"success": True, "machine_id": machine_id, "user_id": market.user["id"], "you_sent": call.body}


def remove_default_job(market, call, machine_id):
    market.find("machines", machine_id)
    if market.tables["default_jobs"].pop(machine_id, None) is None:
        return {"success": False, "msg": "no default job on this machine"}
    return {"success": True, "machine_id": machine_id, "user_id": market.user["id"]}


def schedule_maintenance(market, call, machine_id):
    market.find("machines", machine_id)
    start, hours = (number(value) for value in call.need("sdate", "duration"))
    market.add("maintenances", {"machine_id": machine_id, "start_time": start, "end_time": start + hours * HOUR,
                                "duration_hours": hours,
                                "maintenance_category": call.body.get("maintenance_category")})
    return {"success": True, "notified": 0, "you_sent": call.body}


def cancel_maintenance(market, call, machine_id):
    market.find("machines", machine_id)
    doomed = [row["id"] for row in market.rows("maintenances") if row["machine_id"] == machine_id]
    for maintenance_id in doomed:
        market.remove("maintenances", maintenance_id)
    return {"success": True, "machine_id": machine_id,
            "msg": f"deleted {len(doomed)} scheduled maintenance window(s) on machine {machine_id}"}


def defrag_machines(market, call):
    return {"success": True, "summary": dict.fromkeys(call.need("machine_ids"), {"moved": 0})}


def show_maintenances(market, call):
    wanted = call.query.get("machine_ids")
    return [row for row in market.rows("maintenances") if not wanted or row["machine_id"] in wanted]


def show_reports(market, call, machine_id):
    if machine_id not in {offer["machine_id"] for offer in market.rows("offers")}:
        raise Refusal(404, "not_found", "Machine not found.")
    return [{"problem": "slow disk", "message": "I/O stalls every minute",
             "created_at": market.days_ago(5)}]


def create_cluster(market, call):
    subnet, manager_id = call.need("subnet", "manager_id")
    row = market.add("clusters", {"subnet": subnet, "nodes": cluster_nodes(subnet, [manager_id])})
    return {"success": True, "msg": f"Cluster {row['id']} created"}


def join_cluster(market, call):
    cluster_id, machine_ids = call.need("cluster_id", "machine_ids")
    row = market.find("clusters", cluster_id)
    row["nodes"] += cluster_nodes(row["subnet"], machine_ids, len(row["nodes"]))
    return {"success": True, "msg": f"joined {len(machine_ids)} machines"}


def leave_cluster(market, call):
    cluster_id, machine_id = call.need("cluster_id", "machine_id")
    row, manager_id = market.find("clusters", cluster_id), call.body.get("new_manager_id")
    if machine_id not in [node["machine_id"] for node in row["nodes"]]:
        raise Refusal(404, "not_found", f"Machine {machine_id} is not in cluster {cluster_id}")
    row["nodes"] = [node for node in row["nodes"] if node["machine_id"] != machine_id]
    for node in row["nodes"] if manager_id else ():
        node["is_cluster_manager"] = node["machine_id"] == manager_id
    return {"success": True, "msg": "removed"}


def delete_cluster(market, call):
    market.remove("clusters", call.need("cluster_id"))
    return {"success": True, "msg": f"Cluster {call.body['cluster_id']} deleted"}


def find_overlay(market, name=None, overlay_id=None):
    for row in market.rows("overlays"):
        if row["name"] == name or (name is None and row["overlay_id"] == overlay_id):
            return row
    raise Refusal(404, "not_found", f"Overlay {overlay_id if name is None else name} not found")


def create_overlay(market, call):
    cluster_id, name = call.need("cluster_id", "name")
    market.find("clusters", cluster_id)
    row = market.add("overlays", {"overlay_id": None, "name": name, "internal_subnet": "172.21.0.0/16",
                                  "cluster_id": cluster_id, "instances": []})
    row["overlay_id"] = row["id"]
    return {"success": True, "msg": "Overlay created", "overlay_id": row["id"]}


def join_overlay(market, call):
    name, instance_id = call.need("name", "instance_id")
    find_overlay(market, name)["instances"].append(market.find("instances", instance_id).id)
    return {"success": True, "msg": "joined"}


def delete_overlay(market, call):
    row = find_overlay(market, call.body.get("overlay_name"), call.body.get("overlay_id"))
    market.remove("overlays", row["id"])
    return {"success": True, "msg": f"Overlay {row['name']} deleted"}


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: routes for serverless - endpoints, workergroups, workers
# ----------------------------------------------------------------------------------------------------------------------


def create_endpoint(market, call):
    row = {"min_load": 0, "min_cold_load": 0, "target_util": 0.9, "cold_mult": 2.5, "cold_workers": 5,
           "max_workers": 20, "endpoint_name": None, "max_queue_time": None, "target_queue_time": None,
           "inactivity_timeout": None, "endpoint_state": "active", "user_id": market.user["id"]}
    row.update((name, value) for name, value in call.body.items() if name in row)
    row.update(created_at=market.stamp(market.now()), api_key=digest("endpoint", next(market.ids)),
               auto_delete_in_seconds=None, auto_delete_due_24h=False)
    return {"success": True, "result": market.add("endpoints", row)["id"]}


def delete_endpoint(market, call, endpoint_id):
    market.remove("endpoints", endpoint_id)
    groups = [row for row in market.rows("workergroups") if row["endpoint_id"] == endpoint_id]
    deleted = [worker["id"] for group in groups for worker in workers_of(market, group)]
    for group in groups:
        market.remove("workergroups", group["id"])
    return {"success": True, "msg": "deleted", "deleted_workers": deleted, "failed_workers": []}


def find_endpoint(market, endpoint_id=None, name=None):
    for row in market.rows("endpoints"):
        if endpoint_id == row["id"] or (name and name == row["endpoint_name"]):
            return row
    return None


def create_workergroup(market, call):
    body = call.body
    if not (body.get("template_hash") or body.get("template_id") or body.get("search_params")):
        raise Refusal(400, "invalid_args", "template_hash or search_params is required")
    endpoint = find_endpoint(market, body.get("endpoint_id"), body.get("endpoint_name"))
    if endpoint is None:
        raise Refusal(400, "invalid_args", "Endpointgroup not found for user")
    row = {"min_load": 0, "target_util": 0.9, "cold_mult": 2.5, "cold_workers": 2, "test_workers": 2,
           "template_hash": None, "template_id": None, "search_params": "", "search_query": {}, "launch_args": None,
           "gpu_ram": 24, "created_at": market.now()}
    row.update((name, value) for name, value in body.items() if name in row and value is not None)
    wanted = re.findall(r"(\w+)=(\S+)", row["search_params"])
    row.update(endpoint_id=endpoint["id"], endpoint_name=endpoint["endpoint_name"], user_id=market.user["id"],
               search_query={field: {"eq": value.replace("_", " ")} for field, value in wanted},
               api_key=endpoint["api_key"])
    group = market.add("workergroups", row)
    if endpoint["min_load"]:  # there is work from the first moment on, so its workers are rented at once
        offers = select(market.rows("offers"), row["search_query"])
        terms = {"label": endpoint["endpoint_name"], "image": "vastai/pytorch"}
        group["instances"] = [new_instance(market, offer, terms).id for offer in offers[:endpoint["max_workers"]]]
    return {"success": True, "id": group["id"]}


def delete_workergroup(market, call, group_id):
    workers = workers_of(market, market.find("workergroups", group_id))
    market.remove("workergroups", group_id)
    return {"success": True, "msg": "deleted", "deleted_workers": [row["id"] for row in workers], "failed_workers": []}


def workers_of(market, group):
    """The rented workers of a group, else two cold ones; they boot like instances do, and then measure themselves."""
    ready = market.now() - group["created_at"] >= market.boot
    ids = group.get("instances", [group["id"] * 10, group["id"] * 10 + 1])
    return [{"id": worker_id, "status": "idle" if ready else "loading", "gpu_name": "RTX 4090",
             "measured_perf": 152.3 + nth if ready else 0.0, "url": f"http://192.0.2.{10 + nth}:8000",
             "created_at": market.stamp(group["created_at"])} for nth, worker_id in enumerate(ids)]


def unknown_group(kind, name):
    """The log services answer HTTP 200 and a JSON string when something is wrong."""
    return f"authenticate_{kind}_apikey: invalid api_key or {kind} {name} not found"


def worker_logs(kind):
    def route(market, call):
        name = call.body.get("id") or call.body.get("endpoint")
        table = {"endpoint": "endpoints", "workergroup": "workergroups"}[kind]
        if name not in market.tables[table] and not (kind == "endpoint" and find_endpoint(market, name=name)):
            return unknown_group(kind, name)
        lines = [f"{market.stamp(market.born)} - Worker {nth} started" for nth in range(1, 6)]
        text = "\n".join(lines[-int(call.body.get("tail") or 1000):]) + "\n"
        return {"info0": "boot\n", "info1": text, "trace": "trace: " + text, "debug": "debug: " + text, "logs": text}
    return route


def show_workers(kind):
    def route(market, call):
        wanted = call.need("id")
        groups = [row for row in market.rows("workergroups")
                  if wanted == row["endpoint_id" if kind == "endpoint" else "id"]]
        if not groups and not (kind == "endpoint" and find_endpoint(market, wanted)):
            return unknown_group(kind, wanted)
        return {"workers": [worker for group in groups for worker in workers_of(market, group)]}
    return route


def update_workers(market, call):
    workers = workers_of(market, market.find("workergroups", call.need("workergroup_id")))
    return {"success": True, **({"cancelled": True} if call.body.get("cancel_update") else
                                {"workers_to_update": len(workers)})}


def route_request(market, call):
    """The address of the worker that shall do one piece of work."""
    name, cost = call.need("endpoint", "cost")
    endpoint = find_endpoint(market, name=name)
    groups = [row for row in market.rows("workergroups") if endpoint and row["endpoint_id"] == endpoint["id"]]
    ready = [worker for group in groups for worker in workers_of(market, group) if worker["status"] == "idle"]
    answer = {"endpoint": name, "__request_id": digest("request", next(market.ids))}
    if not ready:
        return dict(answer, status="No worker is ready")
    return dict(answer, url=ready[0]["url"], cost=cost, reqnum=1, signature=digest("signature", name))


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: routes for the account - keys, team, 2FA, money, notifications
# ----------------------------------------------------------------------------------------------------------------------

RIGHT_CODE = "123456"
BACKUP_CODES = [f"AAAA-BBBB-{nth:04d}" for nth in range(1, 9)]
NOTIFICATIONS = {"client:low_credit": "Low balance", "client:outbid": "Instance outbid",
                 "client:instance_offline": "Instance offline", "host:machine_offline": "Machine offline"}


def create_ssh_key(market, call):
    row = {"user_id": market.user["id"], "created_at": market.stamp(market.now()), "deleted_at": None}
    text = call.need("ssh_key").strip()
    return {"success": True, "key": market.add("ssh_keys", dict(row, key=text, public_key=text))}


def update_ssh_key(market, call, key_id):
    row = market.find("ssh_keys", key_id)
    row["key"] = row["public_key"] = call.need("ssh_key").strip()
    return {"success": True, "key": row}


def create_api_key(market, call):
    row = market.add("api_keys", {
        "user_id": market.user["id"], "name": call.need("name"), "team_id": None, "team_name": None,
        "rights": "read" if call.body.get("permissions") else "all", "permissions": call.body.get("permissions") or {}})
    return {"id": row["id"], "key": digest("key", row["id"]) * 2, "permissions": row["permissions"]}


def reset_api_key(market, call):
    market.key = digest("new key", market.key) * 2
    return {"success": True, "new_api_key": market.key}


def set_user(market, call):
    market.user.update((name, value) for name, value in call.body.items() if name not in ("id", "balance", "credit"))
    return {"success": True}


def create_subaccount(market, call):
    email, username, _ = call.need("email", "username", "password")
    if email in [row["email"] for row in market.rows("subaccounts")]:
        raise Refusal(409, "user_exists", "User already exists")
    row = market.add("subaccounts", {
        "email": email, "username": username, "credit": 0.0, "parent_id": market.user["id"],
        "host_only": bool(call.body.get("host_only")), "key_id": next(market.ids), "deleted_at": None,
        "created_at": market.stamp(market.now())})
    return {"id": row["id"], "username": username, "email": email, "key_id": row["key_id"]}


def create_secret(market, call):
    key = call.need("key")
    if key in market.secrets:
        return {"success": False, "error": "existing_key", "msg": f"Key {key} already exists"}
    market.secrets[key] = call.body.get("value")
    return {"success": True, "msg": "Environment variable added"}


def change_secret(market, call):
    """PUT sets and DELETE removes a secret that must be there."""
    key = call.need("key")
    if key not in market.secrets:
        raise Refusal(404, "not_found", f"Key {key} does not exist")
    if call.method == "DELETE":
        del market.secrets[key]
        return {"success": True, "msg": "Environment variable deleted"}
    market.secrets[key] = call.body.get("value")
    return {"success": True, "msg": "Environment variable updated"}


def create_team(market, call):
    name, amount = call.need("team_name"), number(call.body.get("transfer_credit")) or 0.0
    market.spend(amount)
    market.team = {"id": next(market.ids), "name": name}
    return {"success": True, "msg": "Team Successfully Created!", "team_id": market.team["id"]}


def destroy_team(market, call):
    if market.team is None:
        raise Refusal(404, "not_found", "There is no team")
    market.team = None
    for table in ("members", "roles", "invites"):
        market.tables[table].clear()
    return {"success": True, "msg": "Team deleted", "pkey_id": None}


def invite_member(market, call):
    email, role = str(call.query.get("email") or ""), str(call.query.get("role") or "")
    if not (email and role):
        raise Refusal(400, "invalid_args", "email and role are required")
    if email in [row["email"] for row in market.rows("members")]:
        raise Answer(400, {"msg": "User is already a member of this team."})
    market.add("invites", {"email": email, "role": role})
    return {"success": True, "msg": f"New invitation sent to {email}"}


def create_role(market, call):
    name = call.need("name")
    market.add("roles", {"name": name, "identifier": re.sub(r"\W+", "_", name.lower()),
                         "permissions": call.body.get("permissions") or {}})
    return {"msg": "success"}


def find_role(market, call, name):
    """Roles are shown and removed by name, changed by id."""
    for row in market.rows("roles"):
        if name in (row["name"], str(row["id"])):
            return row
    raise Refusal(404, "invalid_args", "Role not found")


def update_role(market, call, name):
    role = find_role(market, call, name)
    role.update((field, call.body[field]) for field in ("name", "permissions") if field in call.body)
    return {"success": True, "msg": "role updated"}


def remove_role(market, call, name):
    market.remove("roles", find_role(market, call, name)["id"])
    return {"success": True}


def check_code(call):
    """Any second factor is right if its code is 123456; each backup code is too."""
    if call.body.get("code") != RIGHT_CODE and call.body.get("backup_code") not in BACKUP_CODES:
        raise Refusal(401, "2fa_verification_failed", "Invalid 2FA code", fail_count=1)


def with_code(**answer):
    """Answers always the same, once the code is right."""
    def route(market, call):
        check_code(call)
        return dict(answer, success=True)
    return route


def tfa_status(market, call):
    return {"tfa_enabled": bool(market.tables["tfa_methods"]), "methods": market.rows("tfa_methods"),
            "backup_codes_remaining": len(BACKUP_CODES)}


def tfa_send(market, call):
    return {"success": True, "secret": digest("secret", next(market.ids))[:16], "msg": f"Code sent: {RIGHT_CODE}"}


def tfa_totp_setup(market, call):
    secret = "JBSWY3DPEHPK3PXP"
    account = urllib.parse.quote(market.user["email"])
    return {"success": True, "secret": secret,
            "provisioning_uri": f"otpauth://totp/Vast.ai:{account}?secret={secret}&issuer=Vast.ai"}


def tfa_confirm(market, call):
    call.need("secret")
    if call.body.get("code") != RIGHT_CODE:
        raise Refusal(400, "2fa_verification_failed", "Invalid verification code")
    first = not market.tables["tfa_methods"]
    market.add("tfa_methods", {
        "user_id": market.user["id"], "is_primary": first, "method": call.body.get("tfa_method", "totp"),
        "label": call.body.get("label"), "phone_number": call.body.get("phone_number"), "created_at": market.now(),
        "last_used": None, "fail_count": 0, "locked_until": None})
    return {"success": True, **({"backup_codes": BACKUP_CODES} if first else {})}


def tfa_delete(market, call):
    check_code(call)
    rows = market.rows("tfa_methods")
    if not rows:
        raise Refusal(404, "not_found", "2FA is not active")
    market.remove("tfa_methods", call.body.get("target_id") or rows[0]["id"])
    return {"success": True, "remaining_methods": len(market.tables["tfa_methods"])}


def tfa_update(market, call):
    row = market.find("tfa_methods", call.need("tfa_method_id"))
    row.update((name, call.body[name]) for name in ("label", "is_primary") if name in call.body)
    return {"success": True, "method": row}


def tfa_authorize(market, call):
    """POST begins, unless a backup code settles it at once; PUT ends with the code."""
    if call.method == "POST" and not call.body.get("backup_code"):
        return tfa_send(market, call)
    check_code(call)
    return {"success": True, "msg": "Authorization successful."}


def transfer_credit(market, call):
    recipient, amount = call.need("recipient", "amount")
    market.spend(number(amount))
    newest = dict(market.rows("payments")[0], id=next(market.ids), when=market.now(), paid_on=market.now(),
                  amount_cents=-round(number(amount) * 100), is_credit=False, service="transfer",
                  extra={"to": recipient})
    market.tables["payments"] = {newest["id"]: newest, **market.tables["payments"]}
    return {"success": True}


def search_invoices(market, call):
    rows = arranged(select(market.rows("payments"), call.query.get("select_filters")), call.query.get("order_by"))
    return columns(rows, call.query.get("select_cols"))


def ledger(market, call, rows):
    """The paged answer that invoices and charges share."""
    for row in rows:
        row.update(when=row["start"], day=row["start"], service=row["metadata"].get("service"))
    rows = select(rows, call.query.get("select_filters"))
    rows = arranged(rows, [["start", "desc" if call.query.get("latest_first") else "asc"]])
    page, following = page_of(rows, call.query, 20, 100)
    hidden = ("when", "day", "service")
    return {"success": True, "count": len(page), "total": len(rows), "next_token": following,
            "results": [{name: value for name, value in row.items() if name not in hidden} for row in page]}


def show_invoices(market, call):
    return ledger(market, call, [
        {"start": row["when"], "end": row["paid_on"], "type": "transfer" if row["service"] == "transfer" else "credit",
         "source": row["service"], "description": "MASTERCARD ...4242" if row["service"] == "stripe_payments" else "",
         "amount": -row["amount_cents"] / 100, "metadata": {"invoice_id": row["id"], "service": row["service"]},
         "items": []} for row in market.rows("payments")])


def show_charges(market, call):
    rows = [{name: value for name, value in row.items() if name != "id"} for row in market.rows("charges")]
    if call.query.get("format") != "tree":
        rows = [dict(row, items=[]) for row in rows]
    return ledger(market, call, rows)


def show_statement(market, call, user):
    """The first generation's invoices: charges and payments in one list, amounts as text."""
    since, until = number(call.query.get("sdate")) or 0.0, number(call.query.get("edate")) or float("inf")
    rows = [{"id": row["id"], "description": row["service"], "quantity": None, "rate": None, "type": "payment",
             "amount": str(row["amount_cents"] / 100), "timestamp": row["when"]} for row in market.rows("payments")]
    if call.query.get("inc_charges") is not False:
        for row in market.rows("charges"):
            rows += [{"id": row["id"], "description": f"{item['type']} charge: {item['description']}", "rate": None,
                      "quantity": "24.000", "amount": str(item["amount"]), "timestamp": row["end"], "type": "charge",
                      "instance_id": int(row["source"].partition("-")[2])} for item in row["items"]]
    due = sum(instance.row["dph_total"] for instance in market.rows("instances") if instance.goal == "running")
    return {"invoices": arranged([row for row in rows if since <= row["timestamp"] <= until], [["timestamp", "asc"]]),
            "current": {"charges": round(due, 4), "service_fee": 0.0, "total": round(due, 4),
                        "credit": market.user["credit"]}}


def earnings(machine_days):
    return {"gpu_earn": 10.5 * machine_days, "sto_earn": 0.25 * machine_days, "bwu_earn": 0.0, "bwd_earn": 0.0}


def show_earnings(market, call, user):
    first, last = number(call.query.get("sday")) or 0, number(call.query.get("eday")) or market.now() / DAY
    machines = [row for row in market.rows("machines") if call.query.get("machid") in (None, row["id"])]
    days = range(max(int(first), int(last) - 90), int(last) + 1)
    total = len(machines) * len(days)
    return {"summary": {"total_gpu": 10.5 * total, "total_stor": 0.25 * total, "total_bwu": 0.0, "total_bwd": 0.0},
            "username": market.user["username"], "email": market.user["email"], "fullname": market.user["fullname"],
            "current": {"balance": market.user["balance"], "service_fee": 0.0, "total": 0.0, "credit": 0.0},
            "per_machine": [dict(earnings(len(days)), machine_id=row["id"]) for row in machines],
            "per_day": [dict(earnings(len(machines)), day=day) for day in days]}


def notification_preferences(market, call, user):
    if call.method == "PUT":
        for context, settings in call.need("notification_preferences").items():
            market.preferences.setdefault(context, {}).update(settings)
    return {"success": True, "notification_preferences": market.preferences}


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


def create_webhook(market, call):
    address, event_types = call.need("webhook_url", "event_types")
    check_event_types(call)
    stamp = market.stamp(market.now())
    row = market.add("webhooks", {"user_id": market.user["id"], "name": call.body.get("name"), "webhook_url": address,
                                  "event_types": event_types, "created_at": stamp, "updated_at": stamp,
                                  "webhook_secret": digest("webhook", next(market.ids))})
    return webhook_answer(row, secret=True)


def show_webhooks(market, call):
    return {"success": True, "webhooks": [shown_webhook(row) for row in market.rows("webhooks")]}


def update_webhook(market, call, webhook_id):
    check_event_types(call)
    row = market.find("webhooks", webhook_id)
    row.update((name, call.body[name]) for name in ("name", "webhook_url", "event_types") if name in call.body)
    row["updated_at"] = market.stamp(market.now())
    return webhook_answer(row)


def rotate_webhook_secret(market, call, webhook_id):
    row = market.find("webhooks", webhook_id)
    row["webhook_secret"] = digest("webhook", next(market.ids))
    return webhook_answer(row, secret=True)


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: the table of routes
# ----------------------------------------------------------------------------------------------------------------------
# {id} is a whole number, any other name in braces one segment of text. A final slash is optional everywhere.


def listing(table, under=None, only=None, **more):
    """Shows all rows, or those the query asks for by the field `only`: as a bare list, or as a member of an object."""
    def route(market, call, *ids):
        rows = [row for row in market.rows(table) if call.query.get(only) in (None, row.get(only))]
        return dict(more, **{under: rows}) if under else rows
    return route


def showing(table, under=None):
    """Shows one row, as it is or as a member of an object."""
    def route(market, call, row_id):
        row = market.find(table, row_id)
        return {"success": True, under: row} if under else row
    return route


def removal(table, **answer):
    def route(market, call, row_id):
        market.remove(table, row_id)
        return answer or {"success": True}
    return route


def on_row(table, **answer):
    """Answers always the same, if there is such a row."""
    def route(market, call, row_id):
        market.find(table, row_id)
        return dict(answer, success=True)
    return route


# fmt: off
ROUTES = {
    # searching
    "POST   /api/v0/bundles/": lambda market, call: {"offers": offers_for(market, call.body)},
    "PUT    /api/v0/search/asks/": search_asks,
    "POST   /api/v0/volumes/search/": searching("volume_offers"),
    "POST   /api/v0/network_volumes/search/": searching("network_offers"),
    "GET    /api/v0/benchmarks/": search_benchmarks,
    "GET    /api/v0/metrics/gpu/current/": metrics_now,
    "GET    /api/v0/metrics/gpu/history/": metrics_history,
    "GET    /api/v0/metrics/gpu/locations/": metrics_locations,
    # renting
    "PUT    /api/v0/asks/{id}/": create_instance,
    "POST   /api/v0/asks/bulk/": create_instances,
    "PUT    /api/v0/launch_instance/": launch_instance,
    # templates
    "GET    /api/v0/template/": search_templates,
    "POST   /api/v0/template/": create_template,
    "PUT    /api/v0/template/": update_template,
    "PUT    /api/v1/template/": update_template,
    "DELETE /api/v0/template/": delete_template,
    # instances
    "GET    /api/v1/instances/": show_instances,
    "GET    /api/v0/instances/filters/": instance_filters,
    "GET    /api/v0/instances/{id}/": show_instance,
    "PUT    /api/v0/instances/{id}/": change_instance,
    "PUT    /api/v0/instances/": change_instance,
    "POST   /api/v0/instances/start/": change_instance,
    "DELETE /api/v0/instances/{id}/": destroy_instances,
    "DELETE /api/v0/instances/": destroy_instances,
    "PUT    /api/v0/instances/reboot/{id}/": restart,
    "PUT    /api/v0/instances/recycle/{id}/": restart,
    "PUT    /api/v0/instances/bid_price/{id}/": change_bid,
    "PUT    /api/v0/instances/prepay/{id}/": prepay,
    "GET    /api/v0/instances/balance/{id}/": show_deposit,
    "PUT    /api/v0/instances/update_template/{id}/": update_instance,
    "PUT    /api/v0/instances/request_logs/{id}/": request_logs,
    "PUT    /api/v0/instances/command/{id}/": execute,
    "GET    /storage/{name}": fetch_result,
    "GET    /api/v0/instances/{id}/ssh/": show_instance_keys,
    "POST   /api/v0/instances/{id}/ssh/": attach_key,
    "DELETE /api/v0/instances/{id}/ssh/{id}/": detach_key,
    "POST   /api/v0/instances/take_snapshot/{id}/": take_snapshot,
    "GET    /api/v0/instance_backups/": listing("backups", under="backups", success=True, only="contract_id"),
    "GET    /api/v0/instance_backups/{id}/download/": backup_files,
    "GET    /api/v0/instances/pending-price-increases/": show_price_increases,
    "PUT    /api/v0/instances/accept-price-increase/": settle_price_increase,
    "PUT    /api/v0/instances/reject-price-increase/": settle_price_increase,
    "POST   /api/v0/contracts/fetch/": fetch_contracts,
    # copies and schedules
    "PUT    /api/v0/commands/rsync/": copy,
    "PUT    /api/v0/commands/copy_direct/": copy,
    "DELETE /api/v0/commands/copy_direct/": lambda market, call: {"success": bool(call.need("dst_id"))},
    "POST   /api/v0/commands/rclone/": cloud_copy,
    "DELETE /api/v0/commands/rclone/": lambda market, call: {"success": bool(call.need("dst_id"))},
    "GET    /api/v0/users/cloud_integrations/": listing("connections"),
    "GET    /api/v0/commands/schedule_job/": listing("jobs"),
    "POST   /api/v0/commands/schedule_job/": create_job,
    "PUT    /api/v0/commands/schedule_job/{id}/": update_row("jobs"),
    "DELETE /api/v0/commands/schedule_job/{id}/": removal("jobs"),
    # volumes and network volumes
    "GET    /api/v0/volumes/": show_volumes,
    "PUT    /api/v0/volumes/": create_volume("volume_offers", "V"),
    "DELETE /api/v0/volumes/": delete_volume,
    "POST   /api/v0/volumes/": list_volume,
    "POST   /api/v0/volumes/unlist/": unlist("volume_offers", "Volume"),
    "POST   /api/v0/volumes/copy/": clone_volume,
    "PUT    /api/v0/network_volumes/": create_volume("network_offers", "N"),
    "POST   /api/v0/network_volumes/": list_network_volume,
    "POST   /api/v0/network_volumes/unlist/": unlist("network_offers", "network volume"),
    "GET    /api/v0/network_disk/": show_network_disks,
    "POST   /api/v0/network_disk/": add_network_disk,
    # hosts
    "GET    /api/v0/machines/": listing("machines", under="machines"),
    "GET    /api/v0/machines/{id}/": lambda market, call, machine_id: [market.find("machines", machine_id)],
    "GET    /api/v0/machines/maintenances/": show_maintenances,
    "GET    /api/v0/machines/{id}/reports/": show_reports,
    "PUT    /api/v0/machines/create_asks/": list_machine,
    "DELETE /api/v0/machines/{id}/asks/": unlist_machine,
    "POST   /api/v0/machines/{id}/force_delete/": delete_machine,
    "PUT    /api/v0/machines/{id}/minbid/": set_min_bid,
    "PUT    /api/v0/machines/create_bids/": set_default_job,
    "DELETE /api/v0/machines/{id}/defjob/": remove_default_job,
    "PUT    /api/v0/machines/{id}/dnotify/": schedule_maintenance,
    "PUT    /api/v0/machines/{id}/cancel_maint/": cancel_maintenance,
    "PUT    /api/v0/machines/{id}/cleanup/": on_row("machines", num_deleted=0, msg="deleted 0 expired contracts"),
    "PUT    /api/v0/machines/defrag_offers/": defrag_machines,
    "GET    /api/v0/users/{user}/machine-earnings/": show_earnings,
    "GET    /api/v0/clusters/": lambda market, call: {"clusters": market.tables["clusters"]},
    "POST   /api/v0/cluster/": create_cluster,
    "PUT    /api/v0/cluster/": join_cluster,
    "DELETE /api/v0/cluster/": delete_cluster,
    "DELETE /api/v0/cluster/remove_machine/": leave_cluster,
    "GET    /api/v0/overlay/": listing("overlays"),
    "POST   /api/v0/overlay/": create_overlay,
    "PUT    /api/v0/overlay/": join_overlay,
    "DELETE /api/v0/overlay/": delete_overlay,
    # serverless
    "GET    /api/v0/endptjobs/": listing("endpoints", under="results", success=True),
    "POST   /api/v0/endptjobs/": create_endpoint,
    "PUT    /api/v0/endptjobs/{id}/": update_row("endpoints"),
    "DELETE /api/v0/endptjobs/{id}/": delete_endpoint,
    "GET    /api/v0/autojobs/": listing("workergroups", under="results", success=True),
    "POST   /api/v0/autojobs/": create_workergroup,
    "PUT    /api/v0/autojobs/{id}/": update_row("workergroups"),
    "DELETE /api/v0/autojobs/{id}/": delete_workergroup,
    "POST   /get_endpoint_logs/": worker_logs("endpoint"),
    "POST   /get_autogroup_logs/": worker_logs("workergroup"),
    "POST   /get_endpoint_workers/": show_workers("endpoint"),
    "POST   /get_workergroup_workers/": show_workers("workergroup"),
    "POST   /update_workers/": update_workers,
    "POST   /route/": route_request,
    "GET    /api/v0/deployments/": listing("deployments", under="deployments", success=True),
    "DELETE /api/v0/deployments/": delete_deployments,
    "GET    /api/v0/deployment/{id}/": showing("deployments", under="deployment"),
    "GET    /api/v0/deployment/{id}/versions/": deployment_versions,
    "POST   /api/v0/deployment/{id}/start/": deployment_state("active"),
    "POST   /api/v0/deployment/{id}/stop/": deployment_state("stopped"),
    "DELETE /api/v0/deployment/{id}/": removal("deployments"),
    # keys and settings
    "GET    /api/v0/ssh/": listing("ssh_keys"),
    "POST   /api/v0/ssh/": create_ssh_key,
    "PUT    /api/v0/ssh/{id}/": update_ssh_key,
    "DELETE /api/v0/ssh/{id}/": removal("ssh_keys"),
    "GET    /api/v0/auth/apikeys/": listing("api_keys", under="apikeys"),
    "POST   /api/v0/auth/apikeys/": create_api_key,
    "GET    /api/v0/auth/apikeys/{id}/": showing("api_keys"),
    "DELETE /api/v0/auth/apikeys/{id}/": removal("api_keys"),
    "PUT    /api/v0/commands/reset_apikey/": reset_api_key,
    "GET    /api/v0/secrets/": lambda market, call: {"success": True, "secrets": market.secrets},
    "POST   /api/v0/secrets/": create_secret,
    "PUT    /api/v0/secrets/": change_secret,
    "DELETE /api/v0/secrets/": change_secret,
    "GET    /api/v0/audit_logs/": listing("audit_logs"),
    "GET    /api/v0/users/current/": lambda market, call: dict(market.user, api_key=market.key),
    "PUT    /api/v0/users/": set_user,
    "POST   /api/v0/users/": create_subaccount,
    "GET    /api/v0/subaccounts/": listing("subaccounts", under="users"),
    "GET    /api/v0/users/{user}/ipaddrs/": listing("addresses", under="results", success=True),
    "GET    /api/v0/notification-types/": listing("notification_types", under="notification_types", success=True),
    "GET    /api/v0/users/{user}/notification-prefs/": notification_preferences,
    "PUT    /api/v0/users/{user}/notification-prefs/": notification_preferences,
    "GET    /api/v0/webhooks/": show_webhooks,
    "POST   /api/v0/webhooks/": create_webhook,
    "PUT    /api/v0/webhooks/{id}/": update_webhook,
    "DELETE /api/v0/webhooks/{id}/": removal("webhooks"),
    "POST   /api/v0/webhooks/{id}/rotate-secret/": rotate_webhook_secret,
    "POST   /api/v0/webhooks/{id}/test/": on_row("webhooks", msg="Test webhook delivered"),
    # two-factor authentication
    "GET    /api/v0/tfa/status/": tfa_status,
    "POST   /api/v0/tfa/": with_code(session_key="sandbox-session-8d1f", backup_codes_remaining=8),
    "DELETE /api/v0/tfa/": tfa_delete,
    "POST   /api/v0/tfa/sms/": tfa_send,
    "POST   /api/v0/tfa/sms/resend/": tfa_send,
    "POST   /api/v0/tfa/email/": tfa_send,
    "POST   /api/v0/tfa/totp-setup/": tfa_totp_setup,
    "POST   /api/v0/tfa/confirm-new/": tfa_confirm,
    "PUT    /api/v0/tfa/regen-backup-codes/": with_code(backup_codes=BACKUP_CODES),
    "PUT    /api/v0/tfa/update/": tfa_update,
    "POST   /api/v0/tfa/authorize-new-method/": tfa_authorize,
    "PUT    /api/v0/tfa/authorize-new-method/": tfa_authorize,
    # team
    "POST   /api/v0/team/": create_team,
    "DELETE /api/v0/team/": destroy_team,
    "GET    /api/v0/team/members/": listing("members"),
    "DELETE /api/v0/team/members/{id}/": removal("members", status="success", message="User removed from the team."),
    "POST   /api/v0/team/invite/": invite_member,
    "POST   /api/v0/team/roles/": create_role,
    "GET    /api/v0/team/roles-full/": listing("roles"),
    "GET    /api/v0/team/roles/{name}/": find_role,
    "PUT    /api/v0/team/roles/{name}/": update_role,
    "DELETE /api/v0/team/roles/{name}/": remove_role,
    # money
    "PUT    /api/v0/commands/transfer_credit/": transfer_credit,
    "GET    /api/v0/invoices/": search_invoices,
    "GET    /api/v1/invoices/": show_invoices,
    "GET    /api/v0/charges/": show_charges,
    "GET    /api/v0/users/{user}/invoices/": show_statement,
}
# fmt: on
for method_and_path, route in list(ROUTES.items()):  # the documented names of the same services
    for name, alias in (("/autojobs/", "/workergroups/"), ("/get_autogroup_logs/", "/get_workergroup_logs/")):
        ROUTES[method_and_path.replace(name, alias)] = route
WITHOUT_KEY = ("/api/v0/bundles", "/api/v0/search/asks", "/api/v0/volumes/search", "/api/v0/network_volumes/search",
               "/storage/")


def pattern_of(method_and_path):
    method, path = method_and_path.split()
    parts = [r"(\d+)" if part == "{id}" else "([^/]+)" if part[0] == "{" else re.escape(part)
             for part in path.strip("/").split("/")]
    return re.compile(f"{method} /{'/'.join(parts)}/?")


PATTERNS = [(pattern_of(method_and_path), route) for method_and_path, route in ROUTES.items()]


def route_for(call):
    """The route and the ids from the path."""
    for pattern, route in PATTERNS:
        match = pattern.fullmatch(f"{call.method} {call.path}")
        if match:
            return route, [int(part) if part.isdigit() and r"\d" in pattern.pattern else urllib.parse.unquote(part)
                           for part in match.groups()]
    raise Refusal(404, "not_found", f"Unknown path: {call.method} {call.path}")


# ----------------------------------------------------------------------------------------------------------------------
# Sandbox: the HTTP server
# ----------------------------------------------------------------------------------------------------------------------


class Sandbox:
    """A simulated Vast.ai on a loopback port; a context manager. See the top of this file for its use.

    `credit` dollars to begin with, `boot` seconds until an instance runs, `rate` requests a second to any one path
    before 429, `strict` to accept no key but `key`, `clock` in place of time.time.
    """

    def __init__(self, port=0, key="sandbox-5f0c2a9be1d74386", credit=25.0, boot=1.0, rate=None, strict=False,
                 clock=time.time):
        self.market = Market(key, credit, boot, clock)
        self.requests, self.failures, self.recent = [], [], collections.defaultdict(collections.deque)
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

    def answer(self, call):
        """(status, body, headers) for one request."""
        with self.lock:
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
        for failure in self.failures:
            pattern, times, answer = failure
            if times and pattern.fullmatch(f"{call.method} {call.path}"):
                failure[1] -= 1
                raise answer
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
        elif key.startswith(("bad", "revoked")) or self.strict and key != self.key:
            raise Refusal(401, "auth_error", "Invalid user key")

    def audit(self, call):
        if call.method != "GET":
            self.market.add("audit_logs", {
                "ip_address": "127.0.0.1", "api_key_id": self.market.user["key_id"], "args": json.dumps(call.body),
                "created_at": self.market.stamp(self.market.now()), "api_route": call.method + "__" + call.path})


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
        status, body, headers = self.server.box.answer(Call(self.command, self.path, dict(self.headers), raw))
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

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = serve

    def log_message(self, *args):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# Tests
# ----------------------------------------------------------------------------------------------------------------------


# ----------------------------------------------------------------------------------------------------------------------
# Sub-commands
# ----------------------------------------------------------------------------------------------------------------------


def sandbox(arguments):
    """Serves a sandbox until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="test_vastai.py sandbox", description=sandbox.__doc__)
    parser.add_argument("--port", type=int, default=0, help="port on 127.0.0.1; any free one by default")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Sandbox(options.port, boot=5.0) as box:
        print(f"export VAST_URL={box.url}\nexport VAST_API_KEY={box.key}", flush=True)
        print("Paste these two lines into another shell, then try: python3 vastai.py search offers. Ctrl-C ends it.",
              file=sys.stderr, flush=True)
        try:
            while True:
                time.sleep(HOUR)
        except KeyboardInterrupt:
            return 0


class Walkthrough:
    """Runs commands as a person would type them, and shows them with their output."""

    def __init__(self, box, home):
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(("VAST", "XDG_"))}
        self.environment.update(HOME=home, USERPROFILE=home, VAST_URL=box.url, VAST_API_KEY=box.key, COLUMNS="120",
                                NO_COLOR="1", PYTHONIOENCODING="utf-8")

    def say(self, text):
        print("\n# " + text, flush=True)

    def run(self, line, status=0, expect=""):
        """Runs `vastai LINE`; the exit status must be `status`, and the regex `expect` must be in the output."""
        print("$ vastai " + line, flush=True)
        done = subprocess.run([sys.executable, os.path.join(HERE, "vastai.py")] + shlex.split(line), cwd=HERE,
                              env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=60)
        output = done.stdout.decode("utf-8", "replace")
        print(output.rstrip("\n"), flush=True)
        if done.returncode or status:
            print(f"(exit status {done.returncode})", flush=True)
        found = re.search(expect, output, re.MULTILINE)
        if done.returncode != status or not found:
            raise Surprise(f"vastai {line}: expected exit status {status} and output that matches {expect!r}")
        return found


class Surprise(Exception):
    """A step of the walk-through did not end as expected."""


def demo(arguments):
    """A first session: find a GPU, rent it, use it, give it back."""
    argparse.ArgumentParser(prog="test_vastai.py demo", description=demo.__doc__).parse_args(arguments)
    with tempfile.TemporaryDirectory() as home, Sandbox(boot=2.0) as box:
        walk = Walkthrough(box, home)
        try:
            walk_through(walk)
        except Surprise as surprise:
            print(f"\nNot as expected: {surprise}", file=sys.stderr)
            return 1
    return 0


def walk_through(walk):
    walk.say("Which single RTX 4090 is the cheapest?")
    cheapest = walk.run("search offers 'gpu_name=RTX_4090 num_gpus=1' -o dph_total --limit 5", expect=r"^\s*(\d+)\b")
    walk.say("Rent it, and wait until it runs.")
    created = walk.run(f"create instance {cheapest.group(1)} --image vastai/pytorch --disk 32 --ssh --direct "
                       "--label first --raw", expect=r'"new_contract": (\d+)')
    instance_id = created.group(1)
    walk.run("wait instance " + instance_id)
    walk.run("show instances", expect=instance_id)
    walk.say("What is it doing, and how to get in?")
    walk.run(f"logs {instance_id} --tail 3", expect="loss=")
    walk.run("ssh-url " + instance_id, expect=r"^ssh://root@[\w.]+:\d+$")
    walk.run(f"label instance {instance_id} 'my training'")
    walk.say("Stop paying for the GPU, then give everything back.")
    walk.run("stop instance " + instance_id)
    walk.run(f"destroy instance {instance_id} -y")
    walk.say("Mistakes are said plainly, and the exit status tells their kind.")
    walk.run("show instance 99999", status=4, expect="99999")
    walk.run("search offers 'gpu_nmae=RTX_4090'", status=1, expect="gpu_nmae")


SUBCOMMANDS = {"demo": demo, "sandbox": sandbox}


def main(argv):
    """A sub-command, or else the tests."""
    if len(argv) > 1 and argv[1] in SUBCOMMANDS:
        return SUBCOMMANDS[argv[1]](argv[2:])
    return unittest.main(module=__name__, argv=argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
