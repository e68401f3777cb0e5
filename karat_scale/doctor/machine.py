"""All checks without a recipe."""

from karat_scale.doctor.decoders import examine_decoders
from karat_scale.doctor.finding import Finding, examine
from karat_scale.doctor.gpus import examine_gpus
from karat_scale.doctor.implementations import examine_attention
from karat_scale.doctor.resources import examine_resources
from karat_scale.doctor.software import examine_extras, examine_libraries, examine_python


def examine_machine() -> list[Finding]:
    """Yield the findings about software, GPUs and resources. Raises nothing, whatever is missing."""
    examinations = {
        "python": examine_python,
        "libraries": examine_libraries,
        "extras": examine_extras,
        "decoders": examine_decoders,
        "attention": examine_attention,
        "GPU": examine_gpus,
        "resources": examine_resources,
    }
    return [finding for name, examination in examinations.items() for finding in examine(name, examination)]
