"""One model on several processes, started by torchrun: each takes its share of every batch, and rank 0 alone writes.

Every process holds the whole model and takes the same steps. All functions do nothing where there is one process.
"""

import os

import torch
import torch.distributed as dist

JOB = os.environ if {"MASTER_ADDR", "WORLD_SIZE", "RANK"} <= os.environ.keys() else {}  # torchrun's description of the job
WORLD, RANK = int(JOB.get("WORLD_SIZE", 1)), int(JOB.get("RANK", 0))  # how many processes there are, and which is this one
LOCAL_WORLD, LOCAL_RANK = int(JOB.get("LOCAL_WORLD_SIZE", WORLD)), int(JOB.get("LOCAL_RANK", 0))  # the same on this machine


def start():
    """Join the other processes: tensors on CUDA are exchanged by nccl, those on the CPU by gloo."""
    if WORLD > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def end():
    if WORLD > 1:
        dist.destroy_process_group()


def agree(value):
    """Rank 0's value (anything that can be pickled), for all."""
    values = [value]
    if WORLD > 1:
        dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """The values of all ranks, in a list, for all."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def anywhere(flag):
    """Whether the flag is true on any rank. On the CPU: no GPU is waited for."""
    return flag if WORLD == 1 else bool(total(torch.tensor(float(flag))))


def total(tensor):
    """The sum of the tensor over the ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters):
    """Every parameter's gradient becomes its sum over the ranks, in one exchange; a missing gradient counts as zero."""
    if WORLD == 1:
        return
    parameters = [p for p in parameters if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    whole = total(torch.cat([g.flatten() for g in gradients]))
    for parameter, part in zip(parameters, whole.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)
