"""A plugin for the CPU harness (``--plugin upset``, after ``served``): engines that go wrong once in a run.

What goes wrong is the word in ``SLIME_LORA_UPSET``; "after N" counts requests of rollouts, per engine:

rejects   two requests are refused, with HTTP 400 and with HTTP 500, then all is well
forgets   the server has been restarted after the first rollout, at the same address: it has no adapters any more
forgets-midway   the same in the middle of the first rollout
hangs     engine 0 neither answers nor passes its health check, so slime kills it and starts another in its place
"""

import os
import time
import urllib.request

import slime_cpu_hooks

ROLLOUT = 16
"""Requests of one rollout of the harness."""


def upset(module):
    kind, engine, refused = os.environ["SLIME_LORA_UPSET"], module._Engine, module._Refused
    generate = engine.generate

    def asked(self, payload):
        """How many requests of rollouts there have been, this one included; None for a sync's proof."""
        if payload["sampling_params"].get("max_new_tokens") == 1:
            return None
        with self.lock:
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked

    def rejecting(self, payload):
        number = asked(self, payload)
        if number == 3:
            raise refused("upset: rejected")
        if number == 5:
            raise RuntimeError("upset: failed")
        return generate(self, payload)

    def forgetting(self, payload):
        number = asked(self, payload)
        try:
            return generate(self, payload)
        finally:
            if number == (ROLLOUT if kind == "forgets" else ROLLOUT // 2):
                self.adapters.clear()
                self.slime_lora_current = None
                self.log("upset: restarted", {})

    def hanging(self, payload):
        if asked(self, payload) is not None and self.args.base_gpu_id == 0 and not (self.dir / "hung").exists():
            (self.dir / "hung").touch()
            self.hangs = True
        while getattr(self, "hangs", False):
            time.sleep(0.1)  # until it is killed
        return generate(self, payload)

    def health(self, payload):
        if getattr(self, "hangs", False):
            raise RuntimeError("upset: not well")
        return {"success": True}

    engine.generate = {"rejects": rejecting, "hangs": hanging}.get(kind, forgetting)
    engine.health_generate = health


class _PassedOn(urllib.request.HTTPErrorProcessor):
    """A router passes on what an engine says, with its status; the harness's breaks the connection."""

    def http_response(self, request, response):
        return response


def passing_on(module):
    build = urllib.request.build_opener
    urllib.request.build_opener = lambda *handlers: build(*handlers, _PassedOn)


if os.environ.get("SLIME_LORA_UPSET"):
    slime_cpu_hooks.after("sglang.srt.entrypoints.http_server", upset)
    slime_cpu_hooks.after("sglang_router.launch_router", passing_on)
