"""Configurations in the API page: an extension of griffe.

transformers makes `__init__` of a configuration's annotated fields when it is imported. The site reads the source
alone, so this extension does the same for it: the fields, their types and their defaults become parameters.
"""

from typing import Any

import griffe


class ConfigurationFields(griffe.Extension):
    """Gives each class that derives from `PreTrainedConfig` its parameters."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add `__init__` from the annotated public fields."""
        if "__init__" in cls.members or not any(str(base).endswith("PreTrainedConfig") for base in cls.bases):
            return
        fields = [
            griffe.Parameter(
                name, annotation=one.annotation, kind=griffe.ParameterKind.keyword_only, default=one.value
            )
            for name, one in cls.attributes.items()
            if one.annotation is not None and "property" not in one.labels and not name.startswith("_")
        ]
        others = griffe.Parameter("kwargs", kind=griffe.ParameterKind.var_keyword)
        function = griffe.Function("__init__", parameters=griffe.Parameters(*fields, others))
        cls.set_member("__init__", function)
