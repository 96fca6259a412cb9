"""The same class under its other name, which only an installed copy has."""
import vastai
import vastai_sdk
from vastai_sdk import Serverless, ServerlessRequest, VastAI

client: vastai.VastAI = VastAI(api_key="key")
client = vastai_sdk.VastAI()
print(client.search_offers(limit=1)[0]["gpu_name"])
serverless: vastai.Serverless = Serverless(api_key="key")
request = ServerlessRequest(vastai_sdk.RequestStatus())
print(serverless.is_open(), request.status)

client.search_offers(limmit=1)  # E
vastai_sdk.VastAI(api_kye="key")  # E
Serverless(api_kye="key")  # E
