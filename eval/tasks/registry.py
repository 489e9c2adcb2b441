"""All tasks by name; `TASKS[task.name] = task` adds one (docs/add-a-task.md)."""

from lookahead_jax.eval.tasks import infinitebench, longbench, longproc, ruler
from lookahead_jax.eval.tasks.base import Task
from lookahead_jax.eval.tasks.own import tasks as own
from lookahead_jax.eval.tasks.reasoning import tasks as reasoning
from lookahead_jax.eval.tasks.shared import tasks as shared

TASKS: dict[str, Task] = {
    task.name: task
    for module in (own, reasoning, shared, ruler, longbench, infinitebench, longproc)
    for task in module.tasks()
}


def find_task(name: str) -> list[Task]:
    """The task of this name, or all tasks of the family before the slash.

    Raises ValueError, naming the families, if there is none.
    """
    if name in TASKS:
        return [TASKS[name]]
    family = [task for key, task in TASKS.items() if key.startswith(f"{name}/")]
    if not family:
        known = sorted({key.partition("/")[0] for key in TASKS})
        raise ValueError(f"unknown task {name!r}; families: {', '.join(known)}")
    return family
