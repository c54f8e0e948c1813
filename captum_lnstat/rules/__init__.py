"""The rules, one a file: ways from a traced forward pass to relevance on the patch grid."""

from captum_lnstat.rules import evidence, gradient, lnstat, perception
from captum_lnstat.rules.relevance import Relevance, Settings
from captum_lnstat.rules.rule import Rule, find_rule, layer_rule_names, register, rule_names

__all__ = [
    "Relevance",
    "Rule",
    "Settings",
    "evidence",
    "find_rule",
    "gradient",
    "layer_rule_names",
    "lnstat",
    "perception",
    "register",
    "rule_names",
]
