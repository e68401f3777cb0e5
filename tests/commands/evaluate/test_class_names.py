"""Classes of another test set are found by name, WordNet id or number."""

from karat_scale.commands.evaluate.test_set import imagenet_wnids, match_classes, wnid_of


def test_names_match_without_case_and_with_underscores() -> None:
    assert match_classes(["Tree_Frog", "cat", "zebu"], ["cat", "tree frog", "dog"]) == [1, 0, None]


def test_equal_names_match_before_similar_ones() -> None:
    assert match_classes(["A", "a", "b"], ["A", "a", "b"]) == [0, 1, 2]
    assert match_classes(["crane", "crane"], ["crane", "crane"]) == [0, 1]
    assert match_classes(["a", "A"], ["A", "a", "b"]) == [1, 0]
    assert match_classes(["A", "a", "b"], ["a", "b"]) == [None, 0, 1]
    assert match_classes(["x_1", "b"], ["x 1", "X 1", "b"]) == [None, 2]


def test_wordnet_ids_and_names_of_imagenet_stand_for_each_other() -> None:
    assert wnid_of("tench") == wnid_of("tench, Tinca tinca") == "n01440764"
    assert match_classes(["n01440764", "n01443537"], ["goldfish", "tench"]) == [1, 0]
    assert match_classes(["goldfish, Carassius auratus", "wagon"], ["n01440764", "n01443537"]) == [1, None]


def test_a_name_that_two_classes_have_is_nobodys() -> None:
    assert wnid_of("crane") == ""  # a bird and a machine
    assert match_classes(["crane"], imagenet_wnids()) == [None]


def test_numbers_are_labels_only_if_all_names_are_numbers_and_ours_are_not() -> None:
    assert match_classes(["0", "10", "2"], ["a", "b", "c"]) == [0, None, 2]
    assert match_classes(["0", "ten"], ["a", "b", "c"]) == [None, None]
    assert match_classes(["10", "2", "3"], ["2", "10"]) == [1, 0, None]


def test_imagenets_labels_are_in_the_order_of_the_ids() -> None:
    wnids = imagenet_wnids()
    assert len(wnids) == 1000
    assert wnids == sorted(wnids)
