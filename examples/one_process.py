"""The whole algorithm on one page, in one process: no Ray, no supervisor, no messages.

    python examples/one_process.py [PRESET] [dotted.key=value ...]

Trains a preset (by default tiny-rc-grpo) on-policy into runs/one_process. ``rl-edit train`` makes
the same bytes from the same settings, in processes that may be lost. Equations are those of the
default preset's method, RC-GRPO-Editing (arXiv 2604.09386).
"""

import sys
from pathlib import Path

import torch

from actors.roles import threads_per_actor
from actors.rollout import roll_out
from learner.controller.work import WorkPlan
from learner.learner import learning_config, minibatches
from learner.policy import TrainedPolicy
from learner.ranks import Alone
from rl_edit.config import RunConfig, load_config
from rl_edit.data import open_dataset
from rl_edit.editors import load_editor, lora
from rl_edit.method.update import learning_step
from rl_edit.rewards import available, score_candidates
from rl_edit.types import AdapterWeights, Advantages, moved


def train(config: RunConfig) -> AdapterWeights:
    torch.set_num_threads(threads_per_actor(config)[0])  # sums may depend on it in the last bit
    algorithm, schedule = config.algorithm, config.train
    editor = load_editor(config.editor)
    # One frozen base carries two adapters: the trained policy, and a copy that rolls out.
    policy, base = TrainedPolicy(config, editor), editor.transformer
    lora.attach(base, config.lora, seed=config.seed, adapter_name=lora.BEHAVIOUR)
    canvas = {"resolution": config.editor.resolution, "multiple": editor.pixels_per_token}
    dataset = open_dataset(config.data, "train", **canvas)
    plan = WorkPlan(config, dataset, pixels_per_token=editor.pixels_per_token)
    rewards, _ = available(tuple(config.rewards.values()), dataset.fields)
    for update in range(schedule.updates):
        acting = policy.weights("acting")
        lora.load(base, acting, adapter_name=lora.BEHAVIOUR)
        lora.set_active(base, True, adapter_name=lora.BEHAVIOUR)
        groups, scored = [], []
        for slot in range(schedule.groups_per_update):
            # Rollout: G candidates of one task. Their noises differ inside the edit mask and hardly
            # outside (Eq. 10-11); the solver integrates all of them from noise to images.
            group, _ = roll_out(editor, config, plan.item(update, slot, acting.id), acting)
            # Rewards: one row per candidate, one column per term, raw. They score the edit, its
            # surroundings, and the attention to the edit region (Eq. 16-18).
            table = score_candidates(rewards, group.candidates, group_id=group.group_id)
            groups.append(group)
            scored.append((group.candidates.task.task_type, table))
        # Credit: advantages within each group, (reward - mean) / deviation (Eq. 4), and the tokens
        # they count for. A group whose scores do not differ teaches nothing and is left out.
        tables, areas = [table for _, table in scored], [group.areas for group in groups]
        trained = {
            slot: (moved(groups[slot], policy.device), moved(credit, policy.device))
            for slot, credit in enumerate(algorithm.credit(tables, areas))
            if isinstance(credit, Advantages)
        }
        # Learning: a clipped surrogate of the policy ratio (Eq. 13-15) at the trained steps of each
        # trajectory. Under the weights that rolled out (on_policy) the ratio must be exactly 1.
        lora.set_active(base, True)
        for index in range(schedule.inner_epochs):
            for slots in minibatches(sorted(trained), schedule):
                learning_step(
                    editor.velocity,
                    policy.others(),
                    policy.parameters,
                    policy.optimizer,
                    algorithm.objective,
                    {slot: trained[slot] for slot in slots},
                    trained=slots,
                    ranks=Alone(),
                    config=learning_config(schedule),
                    num_references=algorithm.initial_noise.num_references,
                    run_seed=config.seed,
                    update=update,
                    pass_index=index,
                    on_policy=policy.weights("policy").id.sha256,
                )
        policy.finish_update(trained=bool(trained), scored=scored)
    return policy.weights("result")


if __name__ == "__main__":
    preset, *overrides = sys.argv[1:] or ["tiny-rc-grpo"]
    config = load_config(preset=preset, overrides=overrides)
    lora.save(Path("runs/one_process"), train(config), config.lora)
