"""TCAQ-DM (Huang et al., AAAI 2025): TCR, DAQ, and progressively aligned reconstruction."""

from __future__ import annotations

from tcaq.recipes.job import Collected, Job
from tcaq.recipes.start import start
from tcaq.spec.recipe import Reconstruction


def tcaq(job: Job) -> None:
    """Initialise with TCR and DAQ, then reconstruct on trajectories that follow the quantized model more and more."""
    data = start(job)
    last = None if job.recipe.reconstruction is None else align(job, job.recipe.reconstruction, data)
    if job.recipe.network is not None:
        own = last or job.collect(rounds_of(job) + 1)
        job.tune(own.trajectories)
    if job.recipe.correction is not None:
        plain = job.collect(rounds_of(job) + 2)
        job.correct(plain.trajectories)
        job.temper(data.images, plain.images, rounds_of(job) + 3)


def rounds_of(job: Job) -> int:
    """How many rounds of alignment the recipe asks for."""
    return job.recipe.alignment.rounds if job.recipe.alignment else 0


def align(job: Job, spec: Reconstruction, data: Collected) -> Collected | None:
    """PAR: round 0 on the float model's trajectories, every further round on those of the quantized model.

    Stops before the last round, and goes back one, when the distance to the float model's images no longer falls.
    Returns: what the model as it is then sampled, if it did.
    """
    rounds, float_images, best = rounds_of(job), data.images, float("inf")
    for round_ in range(rounds + 1):
        iterations = job.recipe.alignment.iterations if round_ and job.recipe.alignment else spec.iterations
        job.reconstruct(round_, data.trajectories, iterations)
        if round_ == rounds and (rounds == 0 or job.judge is None):
            return None  # nothing is left to align to, nor to compare
        sampled = job.collect(round_ + 1)
        score = job.score(round_, float_images, sampled.images)
        if score is not None and score >= best:
            job.restore(round_ - 1)
            return data
        best = best if score is None else score
        data = sampled
    return data
