from cascade.devices.chips import CHIPS, chip_of


def test_every_chip_is_found_by_jaxs_name_of_it():
    names = {
        "TPU v4": "v4",
        "TPU v5 lite": "v5e",
        "TPU v5e": "v5e",
        "TPU v5p": "v5p",
        "TPU v5": "v5p",
        "TPU v6 lite": "v6e",
        "TPU v6e": "v6e",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
    }
    assert {kind: chip_of(kind).name for kind in names} == names
    assert {chip.name for chip in CHIPS} == set(names.values())
    unlisted = ("cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL")
    assert [chip_of(kind) for kind in unlisted] == [None] * 3
