"""The loop of a run: roll out, train, commit, expose; and how it resumes.

                 ┌── cohort ── prompts ── generate ── score ── advantages ─┐   (rollout)
    resume ──►   │                                                         ▼
                 └── probe ◄── commit ◄── provenance ◄── export, save ◄── waves (train)

One commit per step carries its revisions and the exposures that passed since the commit before.
"""
