"""Flows: what is deployed, scheduled and run from the command line."""

from flows.forks import leave_services_behind

leave_services_behind()
