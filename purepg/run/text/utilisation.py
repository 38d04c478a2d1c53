"""Model FLOPs utilisation: how fast a run computes what its equations need, of how fast its devices can compute."""

import jax
import numpy as np

from purepg.language.flops import peak_flops, update_flops
from purepg.run.loop import HostMetrics
from purepg.run.plan import Plan


def utilisation(plan: Plan, metrics: HostMetrics, run_seconds: float) -> dict[str, float]:
    """Entries of summary.json for a run on prompts whose metrics are `[H, S, U]`.

    Returns:
      `flops_per_second`, of updates alone, although the seconds have rewards and evaluations too; and, where the peak
      of the devices is known, `flops_utilisation`, its share of it.
    """
    task = plan.env.task
    prompt = float(np.mean(np.sum(task.judge.prompt >= 0, axis=-1)))
    total = 0.0
    for h, setting in enumerate(plan.settings):
        network, own = setting.configs["network"], setting.configs[plan.code["name"] or ""]
        made, tokens, responses = (
            float(np.nansum(x[h])) for x in (metrics["env_steps"] > 0, metrics["env_steps"], metrics["num_episodes"])
        )
        shape = own.num_prompts, own.group_size, own.num_epochs
        frozen = network.lora_rank is not None
        if made:
            total += made * update_flops(
                network, task.num_tokens, prompt, tokens / responses, shape, frozen, reference=own.kl_coef > 0
            )
    rate = total / run_seconds if run_seconds else float("nan")
    peak = peak_flops(jax.local_devices()[0].device_kind)
    return {"flops_per_second": rate} | ({"flops_utilisation": rate / (peak * plan.num_devices)} if peak else {})
