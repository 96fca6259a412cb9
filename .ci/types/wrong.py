"""Mistakes in the use of the SDK: every type checker must find each one, on the lines marked E and on no other."""
from typing import List

import vastai
from vastai import VastAI

client = VastAI(api_key="key")
offer = client.search_offers()[0]

# the client itself
VastAI(api_kye="key")  # E
VastAI(retry="three")  # E
VastAI("key", "https://example.org", 3, True, False, False, False, 120, "one too many")  # E
vastai.VastAi()  # E
client.serch_offers()  # E

# arguments
client.create_instance(id=1, imgae="ubuntu")  # E
client.create_instance(id="x", image="ubuntu")  # E
client.create_instance(image="ubuntu")  # E
client.create_instance(id=1, image="ubuntu", disk="32 GB")  # E
client.search_offers(type="ondemnd")  # E
client.search_offers(limit="20")  # E
client.search_offers(query=["gpu_name=RTX_4090"])  # E
client.show_instance()  # E
client.destroy_instance(id=None)  # E
client.execute(1)  # E

# results
names: List[str] = client.search_offers()  # E
number: int = client.ssh_url(1)  # E
price: str = offer["dph_total"]  # E
print(offer["dph_totla"])  # E
print(client.show_instances()["id"])  # E
print(client.create_instance(id=1, image="ubuntu").new_contract)  # E


# serverless
async def serverless() -> None:
    async with vastai.Serverless("key", conection_limit=3) as client:  # E
        endpoint = await client.get_endpoint(7)  # E
        endpoint.request("/v1/completions")  # E
        endpoint.request("/v1/completions", {}, cots=8)  # E
        endpoint.request("/v1/completions", {}, timeout="1 m")  # E
        answer = await endpoint.request("/v1/completions", {})
        print(answer.response)  # E
        endpoint.request("/v1/completions", {})["response"]  # E
        await endpoint.get_worker()  # E
        session = await endpoint.session(lifetime="30")  # E
        print(session.id)  # E
    vastai.Endpoint("my-endpoint", 321, "key")  # E
