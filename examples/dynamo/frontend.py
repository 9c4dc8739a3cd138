"""OpenAI's API at port 8100 before Dynamo's workers; a stream moves to another worker up to three times."""

import asyncio

from dynamo.llm import EngineType, EntrypointArgs, make_engine, run_input
from dynamo.runtime import dynamo_worker


@dynamo_worker()
async def main(runtime):
    arguments = EntrypointArgs(EngineType.Dynamic, http_host="127.0.0.1", http_port=8100, migration_limit=3)
    await run_input(runtime, "http", await make_engine(runtime, arguments))


asyncio.run(main())
