"""A plain PyTorch program with FSDP2: trains a transformers model and saves it with DCP. Nothing of ours.

run_ranks(2, fsdp2, folder, "llama")      # rank 0 gives every parameter and state, gathered before the save
"""

import torch


def fsdp2(rank, world_size, folder, name, layout="nested", dtype="float32", steps=3):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from ucp.huggingface_models import made, tokens

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = made(name).to(getattr(torch, dtype))
    mesh = init_device_mesh("cpu", (world_size,))
    for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for _ in range(steps):
        losses.append(step(model, optimizer, tokens()))
    weights, states = get_state_dict(model, optimizer)
    truth = {key: _whole(value) for key, value in weights.items()}
    truth |= {
        f"{key} {state}": _whole(value) for key, entries in states["state"].items() for state, value in entries.items()
    }
    content = {"model": weights, "optim": states, "progress": {"step": steps}}
    if layout == "flat":  # TorchTitan's: the model's names at the top, the optimizer's under one of its own
        content = {**weights, "optimizer": states, "train_state": {"step": steps}}
    dcp.save(content, checkpoint_id=folder)
    return (truth, losses) if rank == 0 else None


def step(model, optimizer, tokens):
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    optimizer.step()
    optimizer.zero_grad()
    return float(loss)


def _whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def fsdp2_goes_on(rank, world_size, folder, name, steps=3):
    """The same program, which loads a folder first: rank 0 gives what stands in it then, by name, and the losses that
    follow."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from ucp.huggingface_models import made, tokens

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    model = made(name)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    mesh = init_device_mesh("cpu", (world_size,))
    for block in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, betas=(0.1, 0.2), weight_decay=0.3)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    content = {"model": weights, "optim": states}
    dcp.load(content, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optim"], options=options
    )
    weights, states = get_state_dict(model, optimizer)
    truth = {key: _whole(value).clone() for key, value in weights.items()}
    truth |= {
        f"{key} {state}": _whole(value).clone()
        for key, entries in states["state"].items()
        for state, value in entries.items()
    }
    groups = [{key: value for key, value in group.items() if key != "params"} for group in states["param_groups"]]
    losses = [step(model, optimizer, tokens()) for _ in range(steps)]
    return (truth, groups, losses) if rank == 0 else None
