import numpy as np
import pyarrow as pa
import pytest
import torch

from twotower.features.fitted import Category, Number
from twotower.features.vocabulary import Vocabulary
from twotower.schema.errors import ConfigError
from twotower.towers.options import TowerOptions
from twotower.towers.towers import Tower, input_width


def features() -> tuple[Category, Number]:
    return Category("city", Vocabulary("user.city", pa.array(["Bern"]), 3), 4), Number("age", False, 0.0, 1.0)


def test_a_category_is_as_wide_as_its_embedding_and_a_number_has_a_flag() -> None:
    assert [input_width(feature) for feature in features()] == [4, 2]


def test_a_tower_without_layers_is_a_projection_of_features_side_by_side_to_unit_length() -> None:
    tower = Tower(features(), TowerOptions("dnn", []), 3)
    city, age = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.5, 0.0]])
    expected = tower.projection(torch.cat([city, age], dim=1)).detach().numpy()[0]
    with torch.no_grad():
        found = tower({"age": age, "city": city}).numpy()[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-5)


def test_dropout_is_active_in_training_alone() -> None:
    tower = Tower(features(), TowerOptions("dnn", [64]), 3, dropout=0.5)
    inputs = {"city": torch.ones(1, 4), "age": torch.ones(1, 2)}
    with torch.no_grad():
        assert not torch.equal(tower(inputs), tower(inputs))
        tower.eval()
        assert torch.equal(tower(inputs), tower(inputs))


def test_a_vector_of_zeros_stays_zero_and_is_no_nan() -> None:
    tower = Tower(features(), TowerOptions("dnn", []), 3)
    torch.nn.init.zeros_(tower.projection.bias)
    vector = tower({"city": torch.zeros(1, 4), "age": torch.zeros(1, 2)})
    vector.sum().backward()
    assert vector.tolist() == [[0, 0, 0]]
    assert tower.projection.weight.grad is not None
    assert torch.isfinite(tower.projection.weight.grad).all()


def test_a_cross_network_by_hand() -> None:
    tower = Tower(features(), TowerOptions("dcn", [], crosses=2), 3)
    first = torch.tensor([[1.0, 2, 3, 4, 0.5, 0.0]])
    crossed = first
    for layer in tower.crosses:
        crossed = first * (crossed @ layer.weight.T + layer.bias) + crossed  # type: ignore[operator,union-attr]
    expected = tower.projection(crossed).detach().numpy()[0]
    with torch.no_grad():
        found = tower({"city": first[:, :4], "age": first[:, 4:]}).numpy()[0]
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-5)


def test_crosses_stand_beside_the_layers() -> None:
    tower = Tower(features(), TowerOptions("dcn", [7, 5], crosses=3), 3)
    assert len(tower.crosses) == 3
    assert tower.projection.in_features == 6 + 5
    assert Tower(features(), TowerOptions("dnn", [7, 5]), 3).projection.in_features == 5
    inputs = {"city": torch.ones(2, 4), "age": torch.ones(2, 2)}
    tower(inputs).sum().backward()
    assert all(parameter.grad is not None for parameter in tower.parameters())


def test_without_a_network_features_and_a_learned_vector_are_added_with_learned_weights() -> None:
    ids = (
        Category("user_id", Vocabulary("user_id", pa.array(["u"]), 3), 2),
        Category("city", Vocabulary("user.city", pa.array(["Bern"]), 3), 2),
    )
    tower = Tower(ids, TowerOptions("none", []), 2)
    with torch.no_grad():
        tower.gains[1] = 0.5  # type: ignore[index]
        tower.shift[:] = torch.tensor([0.0, 1.0])  # type: ignore[index]
        found = tower({"user_id": torch.tensor([[3.0, 0.0]]), "city": torch.tensor([[0.0, 6.0]])})
    np.testing.assert_allclose(found.numpy(), [[0.6, 0.8]], rtol=1e-6)
    assert [name for name, _ in tower.named_parameters()] == ["gains", "shift"]


def test_features_of_another_width_are_not_added() -> None:
    with pytest.raises(ConfigError, match="feature age is 2 wide and the vectors 4"):
        Tower(features(), TowerOptions("none", []), 4)
