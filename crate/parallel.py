"""Several runs at a time, each in a process of its own. No torch here: a worker gets its GPU before torch is imported."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress

from tqdm import tqdm

from crate.cli import InputError


def parallel(function, tasks, jobs, gpus=()):
    """Yield `function(*task)` for every task as it ends, `jobs` at a time; in this process if `jobs` is 1.

    gpus: device numbers (strings) that the processes are spread over, each seeing one as its only GPU. Where a process dies,
    what it and the others were at begins again, in new processes; InputError if three die and no task has ended in between.
    On SIGINT and SIGTERM the processes get a SIGTERM, and are waited for.
    """
    if jobs == 1:
        yield from (function(*task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    left, deaths = list(tasks), 0
    while left:
        queue = context.Queue() if gpus else None
        for job in range(jobs if gpus else 0):
            queue.put(gpus[job % len(gpus)])
        with ProcessPoolExecutor(jobs, context, _start, (queue,)) as pool:
            try:
                futures = {}
                with suppress(BrokenProcessPool):
                    for task in left:
                        futures[pool.submit(_call, function, task)] = task
                for future in as_completed(futures):
                    if isinstance(future.exception(), BrokenProcessPool):
                        continue
                    left.remove(futures[future])
                    deaths = 0
                    yield future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in multiprocessing.active_children():
                    worker.terminate()
                    worker.join()
                raise
        if left:
            deaths += 1
            if deaths == 3:
                raise InputError("--jobs: a worker process died three times (killed? out of memory?); use fewer")
            print(f"a worker process died; {len(left)} tasks are left and begin again", file=sys.stderr)


def _call(function, task):
    try:
        return function(*task)
    except KeyboardInterrupt:  # SIGTERM from the parent: the pool would go on with another task
        os._exit(128 + signal.SIGTERM)


def _start(gpus):
    """In a new worker: take a GPU, and see to it that the worker ends with its parent, however that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a worker that is ended would leave behind
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus.get()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def gpus_of(device, count):
    """The numbers of the GPUs to spread over: all `count` visible ones for "cuda", none for the CPU or one named GPU."""
    if device != "cuda":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(i) for i in range(count)]
