"""Training goes on from any Source in plain torch: our model on one process, torch's AdamW, no engine."""

import torch
from ucp.huggingface_models import our_model


def go_on(source, batches):
    """[loss, gradient norm] of a step with each batch, (inputs [samples, length], labels): from the Source's weights,
    moments, steps, groups and schedule, gradients clipped to 1."""
    from megatron.engine.schedule import LearningRateCurve
    from megatron.ucp.execute import read_into
    from megatron.ucp.runs import shard_runs

    manifest = source.manifest
    settings = manifest.common["model_settings"]
    of_experts = {key: settings[key] for key in settings if key.startswith("moe_")}
    model = our_model(source, batches[0][0].shape[1], **of_experts)
    params = dict(model.named_parameters())
    saved = dict(manifest.common["schedule"])
    samples = saved.pop("num_samples")
    curve = LearningRateCurve(**saved)
    members = {}
    for name, param in params.items():
        members.setdefault(manifest.parameters[name].group, []).append(param)
    optimizer = torch.optim.AdamW(
        [{"params": held, **manifest.optimizer.groups[group]} for group, held in members.items()], foreach=False
    )
    for name, param in params.items():
        moments = {key: torch.zeros(param.numel()) for key in ("exp_avg", "exp_avg_sq")}
        for key, values in moments.items():
            read_into(source, name, key, shard_runs(param.atomic_layout, param.shard_rank), values)
        moments = {key: values.view(param.shape) for key, values in moments.items()}
        optimizer.state[param] = {"step": torch.tensor(manifest.parameters[name].step), **moments}
    found = []
    for inputs, labels in batches:
        loss = torch.nn.functional.cross_entropy(model.logits(inputs).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = curve.learning_rate(samples)
        optimizer.step()
        samples += len(inputs)
        found.append([loss.item(), norm.item()])
    return found
