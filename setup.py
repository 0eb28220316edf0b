from setuptools import find_packages, setup

setup(name="openrl_reason", version="0.1.0", packages=find_packages(include=["openrl_reason*"]))
