"""A program that uses the SDK rightly. No type checker may find anything in it, in its strict mode."""
from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import vastai
from vastai import CoroutineServerless, Endpoint, RequestStatus, Serverless, Session, VastAI

if TYPE_CHECKING:  # the rows are types only: at run time they are plain dicts
    from vastai import CreatedInstance, EndpointRow, Instance, Offer, ServerlessRequest


def cheapest(client: VastAI, gpu: str) -> Offer | None:
    offers = client.search_offers(query=f"gpu_name={gpu} num_gpus=1", type="on-demand", limit=20, storage=16.0)
    return min(offers, key=lambda offer: offer["dph_total"], default=None)


def rent(client: VastAI, offer: Offer) -> int:
    created: CreatedInstance = client.create_instance(id=offer["id"], image="pytorch/pytorch", disk=32.0)
    return created["new_contract"]


def running(client: VastAI) -> list[Instance]:
    return [instance for instance in client.show_instances() if instance["actual_status"] == "running"]


async def complete(prompt: str) -> str:
    async with Serverless(debug=False, connection_limit=16) as client:
        endpoint: Endpoint[ServerlessRequest] = await client.get_endpoint(name="my-endpoint")
        request = endpoint.request("/v1/completions", {"prompt": prompt}, cost=8, timeout=60, max_retries=2)
        request.then(lambda answer: print(answer["status"])).add_done_callback(print)
        print(request.status, request.done(), [worker.perf for worker in await endpoint.get_workers()])
        answer: dict[str, Any] = await request
        return str(answer["response"]["choices"][0]["text"])


async def stream(endpoint: Endpoint[Any]) -> None:
    answer = await endpoint.request("/v1/chat/completions", {"stream": True}, stream=True)
    async for event in answer["response"]:
        print(event)


async def several(name: str) -> list[dict[str, Any]]:
    client = CoroutineServerless("key", instance="alpha", max_poll_interval=1)
    endpoint = await client.get_endpoint(name)
    status = RequestStatus()
    requests = endpoint.request("/a", {}, serverless_request=status), endpoint.request("/b", {})
    answers: list[dict[str, Any]] = list(await asyncio.gather(*requests))
    session: Session
    async with await endpoint.session(lifetime=30) as session:
        answers.append(await session.request("/step", {}))
    seconds = status.complete_time
    print("unfinished" if seconds is None else seconds - status.create_time, client.latencies[-1])
    await client.close()
    return answers


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
    endpoints: list[EndpointRow] = client.show_endpoints()
    print(asyncio.run(complete("Hi")), asyncio.run(several("my-endpoint")), endpoints[0]["id"])


if __name__ == "__main__":
    main()
