"""The same class under its other name, which only an installed copy has."""
import vastai
import vastai_sdk
from vastai_sdk import VastAI

client: vastai.VastAI = VastAI(api_key="key")
client = vastai_sdk.VastAI()
print(client.search_offers(limit=1)[0]["gpu_name"])

client.search_offers(limmit=1)  # E
vastai_sdk.VastAI(api_kye="key")  # E
