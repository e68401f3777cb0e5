import multiprocessing

from karat_scale.data.workers import prepare_worker


def _work(parent: int) -> None:
    prepare_worker(parent, 0)
    multiprocessing.Event().wait(60)


def test_a_worker_whose_trainer_died_before_it_looked_leaves() -> None:
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    assert gone.pid is not None
    worker = multiprocessing.get_context("fork").Process(target=_work, args=(gone.pid,))
    worker.start()
    worker.join(30)
    assert worker.exitcode == 0
