"""Rollout functions of users, ``--custom-generate-function-path own_clients...``."""


async def with_httpx(args, sample, sampling_params):
    """A client of its own to the router, which knows nothing of adapters; the first prompt's base is asked for too."""
    import httpx
    from slime.rollout.sglang_rollout import GenerateState

    from slime_plugins.lora.server.names import BASE

    url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}/generate"
    tokens = GenerateState(args).tokenizer.encode(sample.prompt, add_special_tokens=False)
    payload = {"input_ids": tokens, "sampling_params": sampling_params, "return_logprob": True}
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        if sample.index == 0:
            (await client.post(url, json={**payload, "lora_path": BASE})).raise_for_status()
        response = await client.post(url, json=payload)
        response.raise_for_status()
    output = response.json()
    answer = output["meta_info"]["output_token_logprobs"]
    sample.tokens = tokens + [token for _, token, _ in answer]
    sample.response, sample.response_length = output["text"], len(answer)
    sample.rollout_log_probs = [log_prob for log_prob, _, _ in answer]
    sample.status = type(sample).Status.COMPLETED
    return sample


async def with_two_models(args, sample, sampling_params):
    """slime's own, and for every sample a question to the frozen model of --sglang-config."""
    from slime.rollout.sglang_rollout import generate, get_model_url
    from slime.utils.http_utils import post

    judged = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}
    await post(get_model_url(args, "judge"), judged)
    return await generate(args, sample, sampling_params)
