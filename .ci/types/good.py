"""A program that uses the SDK rightly. No type checker may find anything in it, in its strict mode."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vastai
from vastai import VastAI

if TYPE_CHECKING:  # the rows are types only: at run time they are plain dicts
    from vastai import CreatedInstance, Instance, Offer


def cheapest(client: VastAI, gpu: str) -> Offer | None:
    offers = client.search_offers(query=f"gpu_name={gpu} num_gpus=1", type="on-demand", limit=20, storage=16.0)
    return min(offers, key=lambda offer: offer["dph_total"], default=None)


def rent(client: VastAI, offer: Offer) -> int:
    created: CreatedInstance = client.create_instance(id=offer["id"], image="pytorch/pytorch", disk=32.0)
    return created["new_contract"]


def running(client: VastAI) -> list[Instance]:
    return [instance for instance in client.show_instances() if instance["actual_status"] == "running"]


def main() -> None:
    client = VastAI(api_key="key", server_url="https://example.org", retry=5, raw=True, quiet=True, timeout=30)
    same_class: vastai.VastAI = client
    offers: list[Offer] = same_class.search_offers("gpu_name=RTX_4090", no_default=True)
    print(f"{len(offers)} offers")

    offer = cheapest(client, "RTX_4090")
    if offer is None:
        raise SystemExit("nothing on offer")
    gpu: str = offer["gpu_name"]
    price: float = offer["dph_total"]
    print(f"{offer['num_gpus']} x {gpu} at {price:.2f} an hour")

    number = rent(client, offer)
    address: str = client.ssh_url(number)
    log: str = client.logs(number)
    output: str = client.execute(number, "nvidia-smi")
    print(address, log.splitlines()[-1:], output.strip(), len(running(client)))
    stopped: dict[str, Any] = client.destroy_instance(id=number)
    print(stopped)


if __name__ == "__main__":
    main()
