"""Properties of the samplers, for any sizes."""

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from resnet_nb.data.sampler import PAD, EvalSampler, MicrobatchSampler


def keys(sampler):
    return [[tuple(key) for key in microbatch] for microbatch in sampler]


def sampler(num_samples, num_microbatches, microbatch_size, seed=0, **kw):
    return MicrobatchSampler(num_samples, num_microbatches, microbatch_size, seed, size_at=lambda epoch: 32 + epoch, **kw)


@st.composite
def sizes(draw):
    num_microbatches, microbatch_size = draw(st.sampled_from([1, 2, 4, 6, 8, 12])), draw(st.integers(2, 9))
    # enough that a microbatch has two pictures, however the last step is filled
    return draw(st.integers(2 * num_microbatches * 2, 400)), num_microbatches, max(4, microbatch_size)


def by_step(size, world_size, global_step, **kw):
    """All microbatches of an epoch's rest, in the order of steps, over all ranks."""
    ranks, each = [], size[1] // world_size
    for rank in range(world_size):
        of_rank = sampler(*size, rank=rank, world_size=world_size, **kw)
        of_rank.seek(global_step)
        ranks.append(keys(of_rank))
    return [microbatch for at in range(0, len(ranks[0]), each) for rank in ranks for microbatch in rank[at : at + each]]


@settings(deadline=None)
@given(sizes(), st.sampled_from([1, 2, 3, 4]), st.integers(0, 10**6), st.integers(0, 3))
def test_shards_of_any_world_size_partition_the_epoch(size, world_size, seed, epoch):
    world_size = world_size if size[1] % world_size == 0 else 1
    start = epoch * sampler(*size).steps_per_epoch
    microbatches = by_step(size, world_size, start, seed=seed)
    assert sorted(key[1] for microbatch in microbatches for key in microbatch) == list(range(size[0]))  # every picture once
    assert {len(microbatch) for microbatch in microbatches} <= {size[0] // len(microbatches), size[0] // len(microbatches) + 1}
    assert max(map(len, microbatches)) <= size[2]
    assert {key[0] for microbatch in microbatches for key in microbatch} == {epoch} and {
        key[2] for microbatch in microbatches for key in microbatch
    } == {32 + epoch}
    assert microbatches == by_step(size, 1, start, seed=seed)
    if size[0] > 20:  # two random orders of more than twenty are never the same
        assert microbatches != by_step(size, 1, start, seed=seed + 1)


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
@given(sizes(), st.sampled_from([1, 2, 3, 4]), st.integers(2, 5), st.data())
def test_a_step_holds_every_view_of_its_pictures_on_any_world_size(size, world_size, views, data):
    world_size = world_size if size[1] % world_size == 0 else 1
    steps = sampler(*size).steps_per_epoch
    in_step = size[0] // (views * steps) * views
    assume(in_step >= 2 * size[1])
    step, epoch = data.draw(st.integers(0, steps - 1)), data.draw(st.integers(0, 3))
    tail = by_step(size, world_size, epoch * steps + step, views=views)
    assert tail == by_step(size, 1, epoch * steps, views=views)[step * size[1] :]  # a resume is the tail, with any number of ranks
    first = [key for microbatch in tail[: size[1]] for key in microbatch]
    pictures = {index for _, index, _ in first}
    assert sorted(first) == sorted((epoch * views + view, index, 32 + epoch) for index in pictures for view in range(views))
    assert len(first) == in_step and {len(microbatch) for microbatch in tail} <= {in_step // size[1], -(-in_step // size[1])}
    assert max(map(len, tail)) <= size[2]
    again = [index for microbatch in tail[size[1] :] for _, index, _ in microbatch]
    assert not pictures & set(again)  # no picture is in two steps
    if views <= size[1]:
        assert all(len({index for _, index, _ in microbatch}) == len(microbatch) for microbatch in tail)  # nor twice in a microbatch


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.sampled_from([1, 2, 3, 8]))
def test_validation_sees_each_picture_once(num_samples, batch_size, world_size):
    ranks = [keys(EvalSampler(num_samples, batch_size, lambda epoch: 32, rank, world_size)) for rank in range(world_size)]
    seen = sorted(key[1] for batches in ranks for batch in batches for key in batch if key[1] != PAD)
    assert seen == list(range(num_samples))
    assert len({len(batches) for batches in ranks}) == 1
    assert world_size == 1 or num_samples <= batch_size or ranks[0] != ranks[1]
