"""Seeds by what they are for: known values, since every record and cache of replies was made with them."""

from scope_fast.seeds import seed_of


def test_a_seed_is_what_it_was():
    assert seed_of(0, 3, "chain_sum/7") == 53119387721003167
    assert seed_of("0/3", "chain_sum", 7) == seed_of(0, 3, "chain_sum/7") != seed_of(0, 3, "chain_sum/8")
    assert min(seed_of(i) for i in range(100)) >= 0 and max(seed_of(i) for i in range(100)) < 2**56
