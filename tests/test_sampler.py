"""Properties of the samplers, for any sizes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from resnet_nb.sampler import PAD, EvalSampler, ShardSampler


def keys(sampler):
    return [[tuple(key) for key in shard] for shard in sampler]


def sampler(num_samples, num_shards, shard_size, seed=0, **kw):
    return ShardSampler(num_samples, num_shards, shard_size, seed, size_at=lambda epoch: 32 + epoch, **kw)


@st.composite
def sizes(draw):
    num_shards, shard_size = draw(st.sampled_from([1, 2, 4, 6, 8, 12])), draw(st.integers(2, 9))
    # enough that a shard has two pictures, however the last step is filled
    return draw(st.integers(2 * num_shards * 2, 400)), num_shards, max(4, shard_size)


def by_step(size, world_size, global_step, **kw):
    """All shards of an epoch's rest, in the order of steps, over all ranks."""
    ranks, each = [], size[1] // world_size
    for rank in range(world_size):
        of_rank = sampler(*size, rank=rank, world_size=world_size, **kw)
        of_rank.seek(global_step)
        ranks.append(keys(of_rank))
    return [shard for at in range(0, len(ranks[0]), each) for rank in ranks for shard in rank[at : at + each]]


@settings(deadline=None)
@given(sizes(), st.sampled_from([1, 2, 3, 4]), st.integers(0, 10**6), st.integers(0, 3))
def test_shards_of_any_world_size_partition_the_epoch(size, world_size, seed, epoch):
    world_size = world_size if size[1] % world_size == 0 else 1
    start = epoch * sampler(*size).steps_per_epoch
    shards = by_step(size, world_size, start, seed=seed)
    assert sorted(key[1] for shard in shards for key in shard) == list(range(size[0]))  # every picture once
    assert {len(shard) for shard in shards} <= {size[0] // len(shards), size[0] // len(shards) + 1}
    assert max(map(len, shards)) <= size[2]
    assert {key[0] for shard in shards for key in shard} == {epoch} and {key[2] for shard in shards for key in shard} == {32 + epoch}
    assert shards == by_step(size, 1, start, seed=seed)
    if size[0] > 20:  # two random orders of more than twenty are never the same
        assert shards != by_step(size, 1, start, seed=seed + 1)


@settings(deadline=None)
@given(sizes(), st.sampled_from([1, 2, 4]), st.data())
def test_a_resume_is_the_tail(size, world_size, data):
    world_size = world_size if size[1] % world_size == 0 else 1
    steps = sampler(*size).steps_per_epoch
    step = data.draw(st.integers(0, steps - 1))
    whole, tail = by_step(size, 1, 0), by_step(size, world_size, step)
    assert tail == whole[step * size[1] :]
    assert step == 0 or tail != whole


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2, 3, 8]))
def test_validation_sees_each_picture_once(num_samples, batch_size, world_size):
    ranks = [keys(EvalSampler(num_samples, batch_size, lambda epoch: 32, rank, world_size)) for rank in range(world_size)]
    seen = sorted(key[1] for batches in ranks for batch in batches for key in batch if key[1] != PAD)
    assert seen == list(range(num_samples))
    assert len({len(batches) for batches in ranks}) == 1
    assert world_size == 1 or num_samples <= batch_size or ranks[0] != ranks[1]
