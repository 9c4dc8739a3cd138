"""A worker of NVIDIA Dynamo for one bundle: python worker.py BUNDLE CHECKPOINT

CHECKPOINT has the tokenizer and configuration in Hugging Face's form, from which the frontend makes token ids.
docs/serving.md says how it is started, and what becomes of a stream whose worker is lost.
"""

import asyncio
import sys

import numpy as np
from dynamo.llm import ModelInput, ModelType, WorkerType, register_model
from dynamo.llm.exceptions import InvalidArgument
from dynamo.runtime import dynamo_worker
from lora_drop_runtime import Batch, SamplingOptions
from lora_drop_runtime.errors import InputError
from lora_drop_serve.driver import Driver, RowRequest

DRAWING = "temperature", "top_k", "top_p", "min_p", "seed"
PENALTIES = "repetition_penalty", "presence_penalty", "frequency_penalty"


@dynamo_worker()
async def main(runtime):
    bundle, checkpoint = sys.argv[1:]
    driver = Driver(Batch.open(bundle, slots=8, policy="lossless"), max_waiting=64)
    driver.start()

    async def tokens(request, context):
        """Token ids in, among them those that a lost worker has told; token ids out."""
        prompt, limits, options = request["token_ids"], request["stop_conditions"], request["sampling_options"]
        given = {name: options[name] for name in (*DRAWING, *PENALTIES) if options.get(name) is not None}
        given["top_k"] = max(0, given.get("top_k", 0))  # -1 is off, too
        sampling = SamplingOptions(**{"temperature": 1.0} | given)
        new_tokens = limits["max_tokens"] or driver.max_seq_len - len(prompt)
        with driver.submit([RowRequest(np.array(prompt), new_tokens, {"sampling": sampling})]) as job:
            await job.begin()
            finished = None
            while finished is None and not context.is_stopped():
                for _, event in await job.told():
                    if event.error is not None:
                        raise event.error
                    finished = event.finished
                    yield {"token_ids": [] if event.token is None else [event.token], "finish_reason": finished}

    async def generate(request, context):
        """The same; the frontend answers with 400 what the batch refuses, such as a prompt that is too long."""
        try:
            async for part in tokens(request, context):
                yield part
        except InputError as error:
            raise InvalidArgument(str(error)) from None

    name, kinds = driver.bundle.manifest.model.name, ModelType.Chat | ModelType.Completions
    endpoint = runtime.endpoint("lora_drop.worker.generate")
    await register_model(ModelInput.Tokens, kinds, endpoint, checkpoint, name, worker_type=WorkerType.Aggregated)
    await endpoint.serve_endpoint(generate)


asyncio.run(main())
