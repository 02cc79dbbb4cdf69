"""Several runs at a time, each in a process of its own. No torch here: a worker gets its GPU before torch is imported."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed


def parallel(function, tasks, jobs, gpus=()):
    """Yield `function(*task)` for every task as it ends, `jobs` at a time; in this process if `jobs` is 1.

    gpus: device numbers (strings) that the processes are spread over, each seeing one as its only GPU.
    """
    if jobs == 1:
        yield from (function(*task) for task in tasks)
        return
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    queue = context.Queue()
    for job in range(jobs if gpus else 0):
        queue.put(gpus[job % len(gpus)])
    with ProcessPoolExecutor(jobs, context, _start, (queue if gpus else None,)) as pool:
        try:
            for future in as_completed([pool.submit(function, *task) for task in tasks]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def _start(gpus):
    """In a new worker: take a GPU, and see to it that the worker ends with its parent, however that ends."""
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
